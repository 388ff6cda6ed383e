"""The extension builds from this tree in both kinds, and what was built is what `backends()` says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

REPORT = """
import json, torch, packedbert
from packedbert import dispatch
registered = [key for key in ("CPU", "CUDA") for op in ("prepack_linear", "packed_linear")
              if torch._C._dispatch_has_kernel_for_dispatch_key(f"packedbert::{op}", key)]
print(json.dumps({"file": dispatch.NATIVE.__file__, "cuda": dispatch.NATIVE.cuda_built(), "registered": registered,
                  "backends": {b.name: [b.built, b.usable] for b in packedbert.backends()}}))
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the build needs, without what earlier builds left."""
    if not (ROOT / "setup.py").exists():
        pytest.skip(f"needs the source tree, looked for setup.py in {ROOT}")
    for module in ("setuptools", "ninja"):
        pytest.importorskip(module)
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(ROOT / "packedbert", tree / "packedbert", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tree


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    """Build the extension in place, as pip does it."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)


def report(tree: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run([sys.executable, "-c", REPORT], cwd=tree, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_cpu_build(tree):
    run = build(tree, PACKEDBERT_CUDA="0")
    assert run.returncode == 0, run.stderr
    assert "building CPU kernels only (PACKEDBERT_CUDA=0)" in run.stdout
    got = report(tree)
    assert got["file"].startswith(str(tree))
    assert got["file"].endswith(".abi3.so")
    assert got["registered"] == ["CPU", "CPU"]
    assert got["backends"]["cuda"] == [False, False]


@pytest.mark.skipif(
    not (CUDA_HOME / "bin/nvcc").exists() or not (CUDA_HOME / "include/cuda_runtime.h").exists(),
    reason=f"needs a CUDA toolkit, looked for bin/nvcc and include/cuda_runtime.h in {CUDA_HOME}",
)
def test_cuda_build_without_a_gpu(tree):
    run = build(tree, PACKEDBERT_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;8.6;9.0;10.0;12.0+PTX")
    assert run.returncode == 0, run.stderr
    assert "building CPU and CUDA kernels" in run.stdout
    got = report(tree)
    assert got["cuda"] is True
    assert got["registered"] == ["CPU", "CPU", "CUDA", "CUDA"]
    assert got["backends"]["cuda"] == [True, False]
    assert got["backends"]["cpu"] == [True, True]


def test_impossible_builds_say_so(tree, tmp_path):
    run = build(tree, PACKEDBERT_CUDA="1", CUDA_HOME=str(tmp_path), CUDA_PATH="")
    assert run.returncode != 0
    assert f"PACKEDBERT_CUDA=1, but no bin/nvcc with include/cuda_runtime.h in {tmp_path}" in run.stderr
    run = build(tree, PACKEDBERT_CUDA="yes")
    assert run.returncode != 0
    assert "PACKEDBERT_CUDA: expected auto, 1 or 0, got 'yes'" in run.stderr


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code beside tests/models.py, and not beside the package's sources, which Python would take first."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT / "tests", env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_forced_isa_takes_or_raises(native_library):
    for isa in native_library.available_isas():
        run = run_python("import packedbert; print(packedbert.dispatch.cpu_isa())", PACKEDBERT_CPU_ISA=isa)
        assert run.stdout.strip() == isa, run.stderr
        run = run_python(
            "import packedbert, models; print(packedbert.patch_model(models.tiny_bert()).packedbert_report)",
            PACKEDBERT_CPU_ISA=isa,
        )
        assert f"backend cpu ({isa})" in run.stdout, run.stderr
    run = run_python("import packedbert", PACKEDBERT_CPU_ISA="amx")
    assert run.returncode != 0
    assert "PACKEDBERT_CPU_ISA=amx: set_isa: expected one of [scalar" in run.stderr


WITHOUT_LIBRARY = """
import sys, warnings
sys.modules["packedbert._C"] = None  # an import of it fails
import packedbert, torch
from models import tiny_bert
assert "native library missing" in {b.name: b.detail for b in packedbert.backends()}["cpu"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = packedbert.patch_model(tiny_bert())
    model(torch.zeros(1, 4, dtype=torch.long))
assert [w.category for w in caught] == [packedbert.PackedBertWarning], caught
assert "the native library is missing" in str(caught[0].message)
assert model.packedbert_report.backend == "reference"
try:
    packedbert.patch_model(packedbert.unpatch_model(model), backend="cpu")
except RuntimeError as error:
    assert "backend 'cpu' was asked for, but the native library is missing" in str(error)
else:
    raise AssertionError("a forced backend that is not there was replaced")
"""


def test_without_the_native_library_everything_works_after_one_warning():
    run = run_python(WITHOUT_LIBRARY)
    assert run.returncode == 0, run.stderr


def test_a_forced_isa_without_the_native_library_raises():
    code = 'import sys; sys.modules["packedbert._C"] = None; import packedbert'
    run = run_python(code, PACKEDBERT_CPU_ISA="avx2")
    assert run.returncode != 0
    assert "PACKEDBERT_CPU_ISA=avx2, but the native library is missing" in run.stderr


def test_import_starts_no_thread_and_a_forked_child_works():
    code = """
import os, threading, torch
from transformers import BertModel
before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()
import packedbert
after = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()
assert after == before, (before, after)
from models import tiny_bert
torch.set_num_threads(1)  # a pool that ran before a fork is gone after it: PyTorch's own limit with OpenMP
model = packedbert.patch_model(tiny_bert())
ids = torch.zeros(2, 5, dtype=torch.long)
expected = model(ids).last_hidden_state
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(model(ids).last_hidden_state, expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
