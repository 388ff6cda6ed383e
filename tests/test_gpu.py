"""The ops on a real GPU, against the oracle in float64: `TRITON_INTERPRET=0 pytest -m gpu`. Skipped without one.

With TRITON_INTERPRET=0 Triton compiles here, which its backend and torch.compile need; conftest.py's default is 1.
"""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from models import ROWS_ZERO, prune, tiny_bert
from op_cases import assert_as_exact_as_torch, ragged_qkv, random_layers
from test_backends import CASES, native_ops

import packedbert
from packedbert import dispatch, ops, reference
from packedbert.reference import ACTIVATIONS, NORMS

REASON = next(backend for backend in packedbert.backends() if backend.name == "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not REASON.usable, reason=f"no cuda backend: {REASON.detail}")]

compiles = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "0", reason="Triton is interpreted: set TRITON_INTERPRET=0 and run -m gpu alone"
)
BACKENDS = ["cuda", pytest.param("triton", marks=compiles)]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GPU = "cuda"


def check_linear(dtype, rows, in_features, out_features, activation, norm, times=1):
    shapes = [(rows, in_features), (out_features, in_features), (out_features,), (rows, out_features)]
    shapes += [(out_features,)] * 2
    x, w, b, r, *affine = (torch.randn(shape, dtype=torch.float64).to(dtype).to(GPU) for shape in shapes)
    w = w / max(in_features, 1) ** 0.5
    affine = affine if norm != "none" else [None, None]
    rest = (b, activation, r, norm, *affine)
    own = reference.packed_linear(x, w, *rest)
    exact = reference.packed_linear(*(t.double() if isinstance(t, torch.Tensor) else t for t in (x, w, *rest)))
    for _ in range(times):
        assert_as_exact_as_torch(ops.packed_linear(x, ops.prepack_linear(w), *rest), own, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_linear(dtype, norm, activation):
    for rows, in_features, out_features in itertools.product((0, 1, 65, 300), (0, 1, 77, 768), (1, 9, 717)):
        check_linear(dtype, rows, in_features, out_features, activation, norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [(4096, 768, 768), (4096, 96, 768), (1024, 768, 833), (1000, 833, 768), (32, 3072, 768), (300, 3072, 768)],
)
def test_products_of_every_tile(dtype, norm, rows, in_features, out_features):
    """Sizes for which plan_linear takes large and middle tiles, and parts where a norm adds them."""
    check_linear(dtype, rows, in_features, out_features, "none", norm, times=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [5, 32, 64, 80, 128])
def test_pruned_attention(dtype, head_size):
    for lengths in ((1,), (64, 65, 0, 129), (0, 0), (512,), (1,) * 70):
        qkv, bounds = ragged_qkv(lengths, 3, head_size)
        qkv = qkv.to(dtype).to(GPU)
        own = reference.pruned_attention(qkv, bounds, 3)
        got = ops.pruned_attention(qkv, bounds.to(GPU), 3)
        assert_as_exact_as_torch(got, own, reference.pruned_attention(qkv.double(), bounds, 3))


def sent(value):
    if isinstance(value, torch.Tensor):
        return value.to(GPU)
    return [sent(item) for item in value] if isinstance(value, list) else value


def on_gpu(function):
    """A function of tensors there, from and to the CPU."""
    return lambda *arguments: function(*map(sent, arguments)).cpu()


@pytest.fixture
def functions(backend):
    found = native_ops("cuda")
    if backend == "triton":
        from packedbert import triton_kernels as found
    return SimpleNamespace(**{name: on_gpu(getattr(found, name)) for name in vars(native_ops("cuda"))})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_other_backends_are_held_to(backend, case, functions):
    case.check(case.as_op(functions))


def encoder_arguments(dtype, batch=3, length=70, hidden=64, widths=(70, 9, 0)):
    weights = [w.to(dtype).to(GPU) for w in random_layers([2, 0, 1], widths, 32, hidden, torch.float64)]
    states = torch.randn(batch, length, hidden, dtype=torch.float64).to(dtype).to(GPU)
    mask = torch.rand(batch, length, device=GPU) < 0.6
    mask[0, : length // 2] = False
    mask[1:2] = False
    return states, mask, weights, [2, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(3, 70, 64, (70, 9, 0)), (1, 30, 768, (1000, 9, 0)), (16, 128, 768, (833, 9, 0))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_encoder(dtype, masked, backend, sizes):
    states, mask, weights, heads = encoder_arguments(dtype, *sizes)
    mask = mask if masked else None
    rest = ("gelu", "layer_norm", 1e-12)
    own = reference.encoder(states, mask, weights, heads, *rest)
    exact = reference.encoder(states.double(), mask, [w.double() for w in weights], heads, *rest)
    for _ in range(20):  # what races between blocks would not be the same each time
        got = ops.encoder(states, mask, weights, heads, *rest, backend=backend)
        assert_as_exact_as_torch(got, own, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cuda_graph_records_the_encoder(dtype):
    states, mask, weights, heads = encoder_arguments(dtype)
    cache = ops.PrepackCache()

    def run():
        return ops.encoder(states, mask, weights, heads, backend="cuda", cache=cache.key)

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    graph.replay()
    assert torch.equal(output, expected)
    states.mul_(0.5)  # and other inputs in the same memory
    graph.replay()
    assert torch.equal(output, run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    states, mask, weights, heads = encoder_arguments(dtype)
    prepacked = [ops.prepack_linear(w) if w.dim() == 2 else w for w in weights]
    torch.library.opcheck(
        torch.ops.packedbert.encoder_prepacked.default,
        (states, mask, prepacked, heads, "gelu", "layer_norm", 1e-12, "fp32"),
    )
    torch.library.opcheck(
        torch.ops.packedbert.packed_linear.default,
        (states, prepacked[6], weights[7], "gelu", None, "none", None, None, 1e-12),
    )


@compiles
def test_a_patched_model_and_its_compiled_graph():
    kept = [["kept", ROWS_ZERO, "kept", "kept"]] * 2
    model = prune(tiny_bert(), kept, [["kept"] * 40] * 2).to(GPU, torch.float16)
    ids = torch.randint(0, 61, (4, 20), device=GPU)
    mask = torch.arange(20, device=GPU) < torch.tensor([[20], [3], [11], [1]], device=GPU)
    before = model(ids, mask.long()).last_hidden_state[mask]
    packedbert.patch_model(model, backend="cuda")
    assert dispatch.resolve("auto", ids.device, torch.float16) == "cuda"
    torch.testing.assert_close(model(ids, mask.long()).last_hidden_state[mask], before, rtol=2e-2, atol=2e-2)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        got = compiled(ids, mask.long()).last_hidden_state[mask]
    torch.testing.assert_close(got, before, rtol=2e-2, atol=2e-2)
