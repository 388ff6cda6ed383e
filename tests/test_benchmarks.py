"""The benchmarks still run, at toy sizes: what is not run rots."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: object) -> str:
    """Run a script from another folder than the sources, which Python would import in place of the package."""
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=BENCHMARKS.parent / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_model_benchmark_and_its_report(tmp_path):
    pytest.importorskip("matplotlib")
    results, readme = tmp_path / "model.csv", tmp_path / "README.md"
    assert "written" in run("bench_model.py", "--tiny", "--out", results)
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert {"packedbert", "PyTorch eager", "torch.compile"} <= {row["peer"] for row in rows}
    assert {row["model"] for row in rows} == {"packed", "dense"}
    assert {row["cache"] for row in rows} == {"hot", "cold"}
    for row in rows:
        # L in milliseconds is gflop / sgemm_gflops * 1000; the columns have to agree with each other.
        expected = float(row["median_ms"]) / (float(row["gflop"]) / float(row["sgemm_gflops"]) * 1e3)
        assert float(row["time_over_L"]) == pytest.approx(expected, rel=0.2)
        assert row["cpu"]
        assert row["torch"]
    readme.write_text("before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\nafter\n")
    run("report.py", "--csv", results, "--readme", readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 1, 8 |" in text
    assert results.with_suffix(".png").stat().st_size > 10_000
