"""packedbert.triton_kernels on the CPU, through Triton's interpreter, with its products of bfloat16 mended."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs triton")

import triton.language as tl
from triton.runtime import interpreter

from packedbert import triton_kernels

assert triton_kernels.INTERPRETED, "TRITON_INTERPRET=1 has to be set before triton is imported: see conftest.py"


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
