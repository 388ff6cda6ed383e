"""Which kernels exist here: the native library if it loads, and the choice of a backend for a model.

`reference` is plain PyTorch and works anywhere. `cpu` is the native library's C++. A backend that was asked
for by name is used or refused, never replaced.
"""

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch

#: Environment variables that force a choice for the whole process.
BACKEND_VARIABLE = "PACKEDBERT_BACKEND"
ISA_VARIABLE = "PACKEDBERT_CPU_ISA"

#: Backend names that a config may ask for.
BACKENDS = ("auto", "cpu", "reference")


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
            False,
            "compiled in as a proof of the build; models on a GPU take the reference backend"
            if cuda_built
            else "not built (PACKEDBERT_CUDA=1 builds it where a CUDA toolkit is found)",
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
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the model is in {dtype}, the cpu kernels compute in torch.float32 (load or convert it so)"
    return ""


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs on such tensors: "cpu" or "reference".

    Raises:
        ValueError: a name that does not exist.
        RuntimeError: a backend that was asked for by name cannot run here.
    """
    backend = requested(backend)
    if backend == "reference":
        return backend
    reason = _why_not_cpu(device, dtype)
    if backend == "cpu":
        if reason:
            raise RuntimeError(f"backend 'cpu' was asked for, but {reason}; backend='auto' takes what works")
        return backend
    # Our scalar body exists to be read and tested; PyTorch's own kernels beat it on every processor. Asked for
    # by name (the environment variable), it is used.
    if not reason and (cpu_isa() != "scalar" or ISA_VARIABLE in os.environ):
        return "cpu"
    return "reference"


def why_slower(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an automatic choice ended at the slower `reference`; empty if it did not, or was asked for."""
    if requested(backend) != "auto" or resolve(backend, device, dtype) != "reference":
        return ""
    return _why_not_cpu(device, dtype) or "this processor has neither AVX2 nor AVX-512"
