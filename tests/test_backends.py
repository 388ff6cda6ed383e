"""The same calls on every backend, held to one rule: at most twice PyTorch's own error against float64, plus rounding.

`reference` is the default of each op, `cpu` the native library, `cuda` our kernels emulated, `triton` ours interpreted.
"""

import functools
import itertools
from types import SimpleNamespace

import cuda_emulator
import pytest
from cuda_cases import HALVES, TORCH, attention, linear, rows, small_cases, small_encoders

from packedbert import dispatch, ops, reference

# Sums of products alone, in parts, are an intermediate result of the CUDA kernels.
CASES = [case for case in small_cases() if case.arguments.get("activation") != "sums"]
CASES = [case for case in CASES if case.arguments.get("sums") is None]
CASES += [
    linear(dtype, (64, 64), 9, 70, 71, activation, residual)
    for dtype in TORCH
    for activation, residual in itertools.product(reference.ACTIVATIONS, (False, True))
]
CASES += [
    linear(dtype, (64, 64), *sizes) for dtype in TORCH for sizes in ((0, 8, 9), (5, 0, 9), (1, 1, 1), (65, 33, 63))
]
CASES += [
    rows(dtype, 5, 77, norm, residual=residual)
    for dtype in TORCH
    for norm, residual in itertools.product(reference.NORMS, (False, True))
]
CASES += [
    attention(dtype, lengths, heads, size)
    for dtype in TORCH
    for lengths, heads, size in (((0, 0), 2, 32), ((31, 33, 0, 1), 1, 64), ((70, 7), 1, 128), ((5, 3), 16, 16))
]
CASES += small_encoders()


@pytest.fixture
def on_reference(monkeypatch):
    """As on a machine without the native library."""
    monkeypatch.setattr(dispatch, "NATIVE", None)

    defaults = SimpleNamespace(
        packed_linear=ops._packed_linear_default,
        pruned_attention=lambda *arguments: ops._pruned_attention_default(*arguments, "fp32"),
        encoder=functools.partial(ops.encoder, backend="reference"),
    )
    return lambda case: case.as_op(defaults)


def native_ops(backend):
    """The native library's, as `Case.as_op` takes them."""
    return SimpleNamespace(
        packed_linear=lambda x, weight, *rest: ops.packed_linear(x, ops.prepack_linear(weight), *rest),
        pruned_attention=ops.pruned_attention,
        encoder=functools.partial(ops.encoder, backend=backend),
    )


@pytest.fixture
def on_cpu():
    return lambda case: case.as_op(native_ops("cpu"))


@pytest.fixture(scope="module")
def on_cuda():
    """All in one child process."""
    if reason := cuda_emulator.why_not():
        pytest.skip(reason)
    cases = [case for case in CASES if runs("cuda", case)]
    answers = cuda_emulator.run([(case.method, case.arguments) for case in cases])
    found = dict(zip([case.name for case in cases], answers, strict=True))

    def run(case):
        assert not isinstance(found[case.name], str), found[case.name]
        return found[case.name][0]

    return run


@pytest.fixture
def on_triton():
    from triton_interpreter import triton_kernels  # not at the top: the others don't need triton

    return lambda case: case.as_op(triton_kernels)


#: Where a backend has no kernel of its own in every dtype: products in float32 on a GPU are PyTorch's, and the native
#: library computes in float32, to which only the encoder converts.
DTYPES = {
    ("cuda", "linear"): HALVES,
    **dict.fromkeys([("cpu", method) for method in ("linear", "rows", "attention")], ("float32",)),
}


def runs(backend, case):
    return case.arguments["dtype"] in DTYPES.get((backend, case.method), TORCH)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case.name}")
        for backend in ("reference", "cpu", "cuda", "triton")
        for case in CASES
        if runs(backend, case)
    ],
)
def test_every_backend_is_as_exact_as_torch(backend, case, request):
    case.check(request.getfixturevalue(f"on_{backend}")(case))


@pytest.mark.parametrize("method", ["linear", "rows", "attention", "encoder"])
def test_the_rule_refuses_what_is_off_by_a_tenth(method):
    for case in CASES:
        if case.method == method and (case.oracle.abs() > 1).any():
            with pytest.raises(AssertionError):
                case.check(case.own * 1.1)
