"""What ptxas says of the CUDA kernels: no spill, no local memory, no warning, and no more registers than the table."""

import subprocess
import sys
from pathlib import Path

import cuda_emulator
import pytest

ROOT = Path(__file__).parents[1]
NVCC = cuda_emulator.CUDA_HOME / "bin/nvcc"
pytestmark = pytest.mark.skipif(not NVCC.exists(), reason=f"needs nvcc, looked for {NVCC}")


def check(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / "gpu_resources.py", "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_architecture_keeps_to_the_committed_table():
    run = check()
    assert run.returncode == 0, run.stdout + run.stderr


def test_local_memory_is_refused(tmp_path):
    (tmp_path / "bad.cu").write_text(
        "__global__ void bad(float* x, int i) { float y[64]; for (int j = 0; j < 64; ++j) y[j * i % 64] = x[j]; "
        "x[0] = y[i] + y[i + 1]; }\n"
    )
    run = check("--sources", tmp_path, "--arch", "sm_86")
    assert run.returncode != 0
    assert "ocal memory" in run.stderr
