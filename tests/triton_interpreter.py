"""packedbert.triton_kernels on the CPU, through Triton's interpreter: its products of bfloat16 are mended, and every
buffer of every launch lies between canaries.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import triton.language as tl
from triton.runtime import interpreter

from packedbert import triton_kernels

assert triton_kernels.INTERPRETED, "TRITON_INTERPRET=1 has to be set before triton is imported: see conftest.py"

#: Bytes before and after each buffer: more than a row of any test. All are 0xFF, which reads as NaN in every dtype.
CANARY = 8192


def _as_float(operand: interpreter.TensorHandle) -> np.ndarray:
    if operand.dtype.scalar == tl.bfloat16:  # kept as its bits
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    return operand.data


def _mended_dot(stock):
    """Triton 3.9's interpreter multiplies the bits of bfloat16 as integers (runtime/interpreter.py, create_dot)."""

    def create_dot(self, a, b, d, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return stock(self, a, b, d, *rest)
        product = np.matmul(_as_float(a), _as_float(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    return create_dot


interpreter.InterpreterBuilder.create_dot = _mended_dot(interpreter.InterpreterBuilder.create_dot)


class Caged:
    """A kernel that runs on copies of its tensors, each between canaries that have to be alive afterwards.

    Outputs too, wherever they were allocated. What is read from outside is NaN, and shows in the results.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            cages, copies = {}, {}
            tensors = {id(a): a for a in arguments if isinstance(a, torch.Tensor)}  # x may be y
            for key, tensor in tensors.items():
                assert tensor.is_contiguous()
                cages[key] = torch.full((tensor.nbytes + 2 * CANARY,), 0xFF, dtype=torch.uint8)
                copies[key] = cages[key][CANARY:-CANARY].view(tensor.dtype).view(tensor.shape)
                copies[key].copy_(tensor)
            self.kernel[grid](*(copies.get(id(a), a) for a in arguments), **constants)
            for key, tensor in tensors.items():
                name = self.kernel.arg_names[[id(a) for a in arguments].index(key)]
                alive = torch.cat([cages[key][:CANARY], cages[key][-CANARY:]]) == 0xFF
                assert alive.all(), f"{name}: written outside of {list(tensor.shape)}"
                tensor.copy_(copies[key])

        return launch


def cage(module: ModuleType) -> ModuleType:
    """All kernels of the module `Caged`."""
    for name in ("_linear_kernel", "_norm_kernel", "_attention_kernel"):
        setattr(module, name, Caged(getattr(module, name)))
    return module


def broken_kernels(text: str, broken: str, folder: Path) -> ModuleType:
    """A copy of the kernels with one text, which has to be there once, replaced."""
    source = Path(triton_kernels.__file__).read_text()
    assert source.count(text) == 1, "the bug no longer fits the source: plant it anew"
    file = folder / "broken_kernels.py"
    file.write_text(source.replace(text, broken))
    spec = importlib.util.spec_from_file_location("packedbert.broken_kernels", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cage(module)


cage(triton_kernels)
