"""The benchmarks still run, at toy sizes: what is not run rots."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from models import tiny_bert, tiny_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_and_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks: begin -->\nreplaced\n<!-- benchmarks: end -->\nafter\n")
    # From another folder than the sources, which Python would import in place of the package.
    command = [sys.executable, BENCHMARKS, "--tiny", "--results", tmp_path, "--readme", readme]
    done = subprocess.run(command, cwd=BENCHMARKS.parent / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    def read(name):
        with (tmp_path / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(row["cpu"] and row["torch"] and row["date"] for row in rows)
        return rows

    model = read("model.csv")
    assert {"packedbert", "PyTorch eager", "torch.compile"} <= {row["peer"] for row in model}
    assert {row["model"] for row in model} == {"packed", "dense", "floor"}
    assert {row["cache"] for row in model} == {"hot", "cold"}
    for row in model:
        # L in milliseconds is gflop / sgemm_gflops * 1000; the columns have to agree with each other.
        expected = float(row["median_ms"]) / (float(row["gflop"]) / float(row["sgemm_gflops"]) * 1e3)
        assert float(row["time_over_L"]) == pytest.approx(expected, rel=0.2)
    assert {row["op"] for row in read("ops.csv")} == {"packed_linear", "pruned_attention", "prepack_linear", "encoder"}
    assert {row["series"] for row in read("scaling.csv")} == {"batch", "length", "padded", "fill", "structure"}
    usage = {row["what"]: row for row in read("usage.csv")}
    assert float(usage["patch_model"]["value"]) > 0
    for callers in (1, 2, 4):
        assert usage[f"calls with other bits, {callers} callers"]["met"] == "yes"

    assert {row["precision"] for row in model if row["peer"] == "packedbert"} == {"fp32", "int8"}

    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "replaced" not in text
    assert "| 1, 8 |" in text
    assert "| 1, 8, cold caches |" in text
    assert "| patch_model |" in text
    for plot in ("model.png", "scaling.png"):
        assert (tmp_path / plot).stat().st_size > 10_000


def test_bench_prune_runs_and_goes_on_from_its_stages(tmp_path):
    """On a toy: every stage, the table, and a second run that trains nothing again."""
    context = "the cat sat on a mat . the cat sat on the mat ."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(context.split())), "where", "who", "?"]
    config = tiny_config(vocab_size=len(words), intermediate_size=96, max_position_embeddings=128)
    tiny_bert("BertForQuestionAnswering", config).save_pretrained(tmp_path / "dense")
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    qas = [{"id": str(i), "question": "where ?", "answers": [{"text": "mat", "answer_start": 17}]} for i in range(6)]
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    command = [sys.executable, BENCHMARKS / "bench_prune.py", "--model", tmp_path / "dense", "--costs", "flops"]
    command += [
        "--train",
        squad,
        "--dev",
        squad,
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "results" / "prune.csv",
    ]
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
        with (tmp_path / "results" / "prune.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["model"] for row in rows][:2] == ["dense", "pruned to 1.5x"]
        assert len(rows) == 6
        assert rows[4]["answers_as_masked"] == "6 of 6"
        assert float(rows[4]["logits_error"]) < 1e-4
    readme = tmp_path / "README.md"
    readme.write_text(
        "<!-- benchmarks: begin --><!-- benchmarks: end --> <!-- pruning: begin -->\n<!-- pruning: end -->"
    )
    report = [sys.executable, BENCHMARKS / "report.py", "--results", tmp_path / "results", "--readme", readme]
    subprocess.run(report, check=True, capture_output=True)
    assert "| pruned to 2.0x, trained |" in readme.read_text()
