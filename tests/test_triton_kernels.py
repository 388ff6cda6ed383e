"""The Triton kernels, interpreted on the CPU: the cases of the CUDA kernels, whole encoders, and no byte outside.

None of this ran on a GPU. test_triton_compile.py compiles them for GPUs ahead of time.
"""

import copy
import itertools

import pytest
import torch
from cuda_cases import HALVES, TORCH, attention, linear, small_cases, to_torch
from models import ROWS_ZERO, prune, tiny_bert
from op_cases import assert_as_exact_as_torch, random_layers
from triton_interpreter import triton_kernels

import packedbert
from packedbert import reference

CASES = [case for case in small_cases() if case.method in ("linear", "attention")]
CASES = [case for case in CASES if case.arguments.get("activation") != "sums"]
CASES += [
    linear(dtype, (16, 64), 9, 70, 71, activation, residual)
    for dtype in TORCH
    for activation, residual in itertools.product(reference.ACTIVATIONS, (False, True))
]
CASES += [linear(dtype, (16, 64), *sizes) for dtype in HALVES for sizes in ((0, 8, 9), (1, 1, 1), (65, 33, 63))]
CASES += [
    attention(dtype, lengths, heads, size)
    for dtype in TORCH
    for lengths, heads, size in (((0, 0), 2, 32), ((31, 33, 0, 1), 1, 64), ((70, 7), 1, 128), ((5, 3), 16, 16))
]


def guarded(tensor):
    """A copy of it with sentinels before and after; returns the copy and a check of the sentinels."""
    guard = 256
    flat = torch.full((tensor.numel() + 2 * guard,), 7.0, dtype=tensor.dtype)
    inner = flat[guard : guard + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, lambda: bool((flat[:guard] == 7).all() and (flat[guard + tensor.numel() :] == 7).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_op_as_the_other_backends(case):
    dtype = TORCH[case.arguments["dtype"]]
    checks = []

    def take(name):
        array = case.arguments.get(name)
        if array is None:
            return None
        tensor, check = guarded(to_torch(array, dtype))
        checks.append(check)
        return tensor

    if case.method == "linear":
        got = triton_kernels.packed_linear(
            *(take("input"), take("weight"), take("bias"), case.arguments["activation"], take("residual"))
        )
    else:
        bounds = torch.from_numpy(case.arguments["cu_seqlens"])
        got = triton_kernels.pruned_attention(take("qkv"), bounds, case.arguments["heads"])
    assert_as_exact_as_torch(got, case.own, case.oracle)
    assert all(check() for check in checks)


@pytest.mark.parametrize("dtype", TORCH.values())
@pytest.mark.parametrize("norm", reference.NORMS)
def test_norms_after_a_residual(dtype, norm):
    shapes = [(5, 20), (77, 20), (77,), (5, 77), (77,), (77,)]
    x, w, b, r, *affine = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    affine = [None, None] if norm == "none" else affine
    exact = [None if t is None else t.double() for t in affine]
    oracle = reference.packed_linear(x.double(), w.double(), b.double(), "none", r.double(), norm, *exact)
    own = reference.packed_linear(x, w, b, "none", r, norm, *affine)
    assert_as_exact_as_torch(triton_kernels.packed_linear(x, w, b, "none", r, norm, *affine), own, oracle)


MASK = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0] * 7, [1] * 7]).bool()


@pytest.mark.parametrize("dtype", TORCH.values())
@pytest.mark.parametrize("mask", [None, MASK, torch.zeros_like(MASK)], ids=["all", "some", "none"])
def test_whole_encoders(dtype, mask):
    heads = [2, 0, 1]
    weights = [w.to(dtype) for w in random_layers(heads, [5, 9, 0], 16, 32, torch.float64)]
    states = torch.randn(3, 7, 32, dtype=torch.float64).to(dtype)
    rest = (heads, "gelu", "layer_norm", 1e-12)
    oracle = reference.encoder(states.double(), mask, [w.double() for w in weights], *rest)
    own = reference.encoder(states, mask, weights, *rest)
    if mask is not None:
        states[~mask] = float("nan")  # what stands at padded positions has no influence
    got = triton_kernels.encoder(states, mask, weights, *rest)
    assert_as_exact_as_torch(got, own, oracle)
    assert mask is None or not got[~mask].any()


@pytest.mark.parametrize("dtype", TORCH.values())
def test_a_patched_model(dtype):
    kept = [["kept", ROWS_ZERO, "kept", ROWS_ZERO], [ROWS_ZERO] * 4]
    model = prune(tiny_bert(), kept, [["kept", ROWS_ZERO] * 20] * 2)
    ids, mask = torch.randint(0, 61, (3, 9)), torch.arange(9) < torch.tensor([[9], [0], [4]])
    exact = packedbert.patch_model(copy.deepcopy(model).double(), backend="reference")
    own = packedbert.patch_model(copy.deepcopy(model).to(dtype), backend="reference")
    packedbert.patch_model(model.to(dtype), backend="triton")
    assert model.packedbert_report.backend == "triton"
    oracle, own, got = (m(ids, mask.long()).last_hidden_state for m in (exact, own, model))
    assert_as_exact_as_torch(got, own, oracle)
    assert not got[~mask].any()


def test_a_compiled_model_has_no_graph_break():
    model = packedbert.patch_model(tiny_bert(), backend="triton")
    ids = torch.randint(0, 61, (2, 5))
    expected = model(ids).last_hidden_state
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).last_hidden_state
    torch.testing.assert_close(got, expected)


def test_the_sentinels_show_what_is_outside():
    inner, check = guarded(torch.zeros(4))
    assert check()
    inner.as_strided((5,), (1,))[4] = 0
    assert not check()


def test_a_new_length_starts_no_new_search(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_chosen", {})
    searches, tiles = [], triton_kernels.linear_tiles(float32=False)

    def bench(run, **_):
        searches.append(run)
        return float(len(searches))

    monkeypatch.setattr(triton_kernels.triton.testing, "do_bench", bench)
    for rows in range(1, 5000, 7):
        for out_features, in_features in ((768, 768), (717, 768), (768, 552), (2304, 768)):
            key = triton_kernels.bucket(rows, out_features, in_features)
            assert triton_kernels.choose_tile(key, lambda tile: None, tiles) == tiles[0]
    buckets = len(searches) // len(tiles)
    assert buckets <= 5  # of tokens; the seed's sizes share one
