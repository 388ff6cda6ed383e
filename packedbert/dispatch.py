"""Which kernels exist here: the native library if it loads, and the choice of a backend for a model.

`reference` is plain PyTorch and works anywhere. `cpu` and `cuda` are the native library's C++ and CUDA, `triton` is
triton_kernels.py. A backend that was asked for by name is used or refused, never replaced.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch

#: Environment variables that force a choice for the whole process.
BACKEND_VARIABLE = "PACKEDBERT_BACKEND"
ISA_VARIABLE = "PACKEDBERT_CPU_ISA"
VARIABLES = (BACKEND_VARIABLE, ISA_VARIABLE)

#: Backend names that a config may ask for.
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")

#: The oldest GPU generation that the CUDA kernels run on: Ampere.
_COMPUTE_CAPABILITY = (8, 0)

#: Set to 1, Triton's kernels are interpreted, on the CPU too: for tests.
INTERPRET_VARIABLE = "TRITON_INTERPRET"

#: What our kernels take; those for the CPU compute all of them in float32.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedBertWarning(UserWarning):
    """The model works, but not with the fastest kernels; the text says why and what to do."""


@dataclass(frozen=True)
class BackendStatus:
    """One row of `backends()`."""

    name: str
    built: bool
    usable: bool
    detail: str


def _load_native() -> tuple[ModuleType | None, str]:
    """The native library and "", or None and why it is missing. A forced ISA that is impossible raises."""
    forced = os.environ.get(ISA_VARIABLE)
    try:
        library = importlib.import_module("packedbert._C")
    except ImportError as error:
        if forced:
            raise RuntimeError(
                f"{ISA_VARIABLE}={forced}, but the native library is missing ({error}): install packedbert with "
                f"a C++ compiler present, or unset {ISA_VARIABLE}"
            ) from error
        return None, str(error)
    if forced:
        try:
            library.set_isa(forced)
        except ValueError as error:
            raise RuntimeError(f"{ISA_VARIABLE}={forced}: {error}") from error
    return library, ""


NATIVE, NATIVE_ERROR = _load_native()


def cpu_isa() -> str:
    """The instruction set that the native CPU kernels use: a name of `_C.available_isas()`, or "none" without them."""
    return NATIVE.isa() if NATIVE is not None else "none"


def backends() -> list[BackendStatus]:
    """What is built, what is usable here, and if not, why."""
    native = NATIVE is not None
    cuda_built = NATIVE is not None and NATIVE.cuda_built()
    gpu = torch.device("cuda")
    why_not_cuda = _why_not_cuda(gpu, torch.float32)
    why_not_triton = _why_not_triton(gpu, torch.float32)
    return [
        BackendStatus("reference", True, True, "plain PyTorch, any device and floating dtype"),
        BackendStatus(
            "cpu",
            native,
            native,
            f"C++ kernels in float32 and int8, using {cpu_isa()}"
            if native
            else f"native library missing: {NATIVE_ERROR}",
        ),
        BackendStatus(
            "cuda",
            cuda_built,
            not why_not_cuda,
            why_not_cuda or "CUDA kernels in float16, bfloat16 and float32 (run on an H200 so far)",
        ),
        BackendStatus(
            "triton",
            _has_triton(),
            not why_not_triton,
            why_not_triton or "Triton kernels in float16, bfloat16 and float32 (run on an H200 so far)",
        ),
    ]


def requested(backend: str) -> str:
    """The backend that config and environment ask for together: the environment decides where a config says "auto".

    Raises:
        ValueError: a name that does not exist.
    """
    origin = "backend"
    if backend == "auto" and (forced := os.environ.get(BACKEND_VARIABLE)):
        backend, origin = forced, BACKEND_VARIABLE
    if backend not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _why_not_cpu(device: torch.device, dtype: torch.dtype) -> str:
    """Empty if the native CPU kernels can run on such tensors, else the reason."""
    if NATIVE is None:
        return f"the native library is missing ({NATIVE_ERROR})"
    if device.type != "cpu":
        return f"the model is on {device}, the cpu kernels need it on the CPU"
    if dtype not in _DTYPES:
        return f"the model is in {dtype}, the cpu kernels compute in torch.float32 (load or convert it so)"
    return ""


def _why_not_cuda(device: torch.device, dtype: torch.dtype) -> str:
    """Empty if the native CUDA kernels can run on such tensors, else the reason."""
    if NATIVE is None:
        return f"the native library is missing ({NATIVE_ERROR})"
    if not NATIVE.cuda_built():
        return "the CUDA kernels are not built (PACKEDBERT_CUDA=1 builds them where a CUDA toolkit is found)"
    if device.type != "cuda":
        return f"the model is on {device}, the cuda kernels need it on a GPU"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if (capability := torch.cuda.get_device_capability(device)) < _COMPUTE_CAPABILITY:
        need = "{}.{}".format(*_COMPUTE_CAPABILITY)
        return "the GPU has compute capability {}.{}, the cuda kernels need {}".format(*capability, need)
    if dtype not in _DTYPES:
        return f"the model is in {dtype}, the cuda kernels take float16, bfloat16 and float32"
    return ""


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Empty if the Triton kernels can run on such tensors, else the reason."""
    if not _has_triton():
        return "triton is not installed"
    if os.environ.get(INTERPRET_VARIABLE, "0") != "1":
        if device.type != "cuda":
            return f"the model is on {device}, the triton kernels need it on a GPU"
        if not torch.cuda.is_available():
            return "PyTorch finds no GPU"
    if dtype not in _DTYPES:
        return f"the model is in {dtype}, the triton kernels take float16, bfloat16 and float32"
    return ""


_WHY_NOT = {"cpu": _why_not_cpu, "cuda": _why_not_cuda, "triton": _why_not_triton}


# A compiler takes the answer as it is, and does not look into the native library.
@torch.compiler.assume_constant_result
def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs on such tensors: one of `BACKENDS`, but not "auto".

    Raises:
        ValueError: a name that does not exist.
        RuntimeError: a backend that was asked for by name cannot run here.
    """
    backend = requested(backend)
    if backend == "reference":
        return backend
    if backend in _WHY_NOT:
        if reason := _WHY_NOT[backend](device, dtype):
            raise RuntimeError(f"backend {backend!r} was asked for, but {reason}; backend='auto' takes what works")
        return backend
    if device.type == "cuda":
        return next((name for name in ("cuda", "triton") if not _WHY_NOT[name](device, dtype)), "reference")
    # Our scalar body exists to be read and tested; PyTorch's own kernels beat it on every processor. Asked for
    # by name (the environment variable), it is used.
    if not _why_not_cpu(device, dtype) and (cpu_isa() != "scalar" or ISA_VARIABLE in os.environ):
        return "cpu"
    return "reference"


def why_slower(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an automatic choice ended at the slower `reference`; empty if it did not, or was asked for."""
    if requested(backend) != "auto" or resolve(backend, device, dtype) != "reference":
        return ""
    fastest = "cuda" if device.type == "cuda" else "cpu"
    return _WHY_NOT[fastest](device, dtype) or "this processor has neither AVX2 nor AVX-512"
