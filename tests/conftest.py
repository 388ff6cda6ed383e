"""Fixtures that every test may use, and the settings of hypothesis."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its own library is decorated then

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

from packedbert import dispatch

settings.register_profile(
    "packedbert", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("packedbert")

transformers.utils.logging.disable_progress_bar()  # its carriage returns drown what pytest prints

#: Reference checkpoints, models and data that are too large for the repository.
SHARED = Path(os.environ.get("PACKEDBERT_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def native_library():
    """The suite is about the kernels: it must not pass because they were missing."""
    if dispatch.NATIVE is None:
        pytest.exit(f"packedbert's native library is missing: {dispatch.NATIVE_ERROR}", returncode=3)
    return dispatch.NATIVE


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference files; tests that need it are skipped without it."""
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"needs the reference files, looked for them in {SHARED} (PACKEDBERT_SHARED names another place)")
    return SHARED


@pytest.fixture(scope="session", params=["safetensors", "bin"])
def reference_checkpoint(request, shared, tmp_path_factory) -> Path:
    """The seed's exact structure with random weights, in both file formats."""
    folder = tmp_path_factory.mktemp(f"reference_{request.param}")
    script = shared / "reference" / "make_reference_checkpoint.py"
    subprocess.run([sys.executable, script, folder, "--format", request.param], check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


@pytest.fixture(params=dispatch.NATIVE.available_isas() if dispatch.NATIVE else [])
def isa(request):
    """Every instruction set that this machine runs."""
    best = dispatch.NATIVE.isa()
    dispatch.NATIVE.set_isa(request.param)
    assert dispatch.NATIVE.isa() == request.param  # the force took
    yield request.param
    dispatch.NATIVE.set_isa(best)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
