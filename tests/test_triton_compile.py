"""The Triton kernels compile ahead of time for GPUs that aren't here: no spills, and matrix instructions in them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_half_precision_on_one_gpu_of_each_maker():
    """All targets and dtypes, the committed table, take minutes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCHMARKS / "triton_resources.py", "--check", "--dtype", "fp16"]
    command += ["--target", "sm_86", "--target", "gfx942"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "32 kernels compiled, 0 of them are wrong" in run.stdout


def test_the_committed_table_has_no_spill():
    rows = list(csv.DictReader((BENCHMARKS / "results" / "triton_resources.csv").open()))
    assert {row["target"] for row in rows} == {"sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"}
    assert {row["dtype"] for row in rows} == {"fp16", "bf16", "fp32"}
    assert {row["sizes"] for row in rows} == {"x16", "odd"}
    assert [row for row in rows if row["spilled"] != "0"] == []
    products = [row for row in rows if row["kernel"] != "_norm_kernel" and row["dtype"] != "fp32"]
    assert [row for row in products if row["matrix_instructions"] == "0"] == []
