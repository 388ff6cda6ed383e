"""The native attention and encoder: every instruction set, any number of threads, long and ragged batches."""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from op_cases import assert_as_exact_as_torch, prepacked_layers, ragged_qkv, random_layers

from packedbert import ops, reference


def encoder_case(batch, length, real, hidden=48, heads=(3, 0, 2), widths=(70, 33, 0), head_size=8):
    """Arguments of the reference encoder in float64; `real` tokens of each row of the mask, in random places."""
    generator = torch.Generator().manual_seed(batch * length)
    states = torch.randn(batch, length, hidden, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, length, generator=generator).argsort(1) < torch.tensor(real)[:, None]
    weights = random_layers(heads, widths, head_size, hidden, torch.float64)
    return states, mask, weights, list(heads)


def native(states, mask, weights, heads, activation="gelu", norm="layer_norm"):
    weights = prepacked_layers([w.float() for w in weights])
    return ops.encoder_prepacked(states.float(), mask, weights, heads, activation, norm, 1e-12)


# -------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("size", [1.0, 1e5])  # the second one's scores are further apart than e^x can hold
@pytest.mark.parametrize("head_size", [1, 5, 32, 33, 64, 80])
def test_attention_on_every_isa(isa, head_size, size):
    lengths = [1, 13, 0, 14, 15, 33, 100]
    qkv, bounds = ragged_qkv(lengths, 3, head_size, size)
    got = ops.pruned_attention(qkv.float(), bounds, 3)
    expected = [reference.pruned_attention(x, bounds, 3) for x in (qkv.float(), qkv)]
    assert_as_exact_as_torch(got, *expected)


@pytest.mark.parametrize("length", [512, 513, 1100, 4096])
@pytest.mark.parametrize("size", [0.1, 1.0, 8.0])
def test_attention_over_long_sequences(isa, length, size):
    """Several rounds over the keys, scores from flat to far beyond what exp can hold."""
    qkv, bounds = ragged_qkv([length, 3], 1, 16, size)
    got = ops.pruned_attention(qkv.float(), bounds, 1)
    expected = [reference.pruned_attention(x, bounds, 1) for x in (qkv.float(), qkv)]
    assert_as_exact_as_torch(got, *expected)


@pytest.mark.parametrize("length", [5, 40, 1200])
@pytest.mark.parametrize("place", [0, 4, -1])
def test_a_nan_key_reaches_its_whole_sequence_and_no_other(isa, length, place):
    qkv, bounds = ragged_qkv([length, 7], 2, 8)
    qkv[:length][place, 16 + 3] = float("nan")  # a key of head 0
    got = ops.pruned_attention(qkv.float(), bounds, 2)
    assert got[:length, :8].isnan().all()
    assert torch.isfinite(got[:length, 8:]).all()
    assert torch.isfinite(got[length:]).all()


def test_attention_has_the_same_bits_in_any_batch(isa):
    qkv, _ = ragged_qkv([50, 9, 70], 2, 32)
    qkv = qkv.float()
    together = ops.pruned_attention(qkv, torch.tensor([0, 50, 59, 129], dtype=torch.int32), 2)
    for begin, end in ((0, 50), (50, 59), (59, 129)):
        alone = ops.pruned_attention(qkv[begin:end], torch.tensor([0, end - begin], dtype=torch.int32), 2)
        assert torch.equal(alone, together[begin:end])


# ---------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize("norm", ["layer_norm", "no_norm"])  # without any, three layers amplify each rounding
@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 40), (2, 300)], ids=str)
def test_encoder_on_every_isa(isa, shape, activation, norm):
    """Few tokens and many, that is steps split among threads and token panels."""
    batch, length = shape
    states, mask, weights, heads = encoder_case(batch, length, [length, length // 2, 1][:batch])
    got = native(states, mask, weights, heads, activation, norm)
    own = reference.encoder(states.float(), mask, [w.float() for w in weights], heads, activation, norm, 1e-12)
    assert_as_exact_as_torch(got, own, reference.encoder(states, mask, weights, heads, activation, norm, 1e-12))
    assert (got[~mask] == 0).all()


def in_any_order(states, mask, weights, heads, generator):
    """PyTorch's float32 result, every sum of a product in a random order: over hidden units, a head's, the FFN's."""
    order = torch.randperm(states.shape[-1], generator=generator)
    permuted = []
    for w, count in zip(reference.split_layers([weight.float() for weight in weights]), heads, strict=True):
        ffn = torch.randperm(len(w.up_weight), generator=generator)
        width = w.attention_output_weight.shape[1]
        context = torch.arange(width).view(count, -1) if count else torch.arange(0).view(0, 0)
        context = context[:, torch.randperm(context.shape[1], generator=generator)].flatten()
        qkv = torch.cat([context, width + context, 2 * width + context])
        rows = {name: value[order] for name, value in w._asdict().items() if not name.startswith(("qkv", "up"))}
        permuted += w._replace(
            **rows
            | {"qkv_weight": w.qkv_weight[qkv][:, order], "qkv_bias": w.qkv_bias[qkv]}
            | {"up_weight": w.up_weight[ffn][:, order], "up_bias": w.up_bias[ffn]}
            | {"attention_output_weight": rows["attention_output_weight"][:, context]}
            | {"down_weight": rows["down_weight"][:, ffn]}
        )
    result = reference.encoder(states.float()[..., order], mask, permuted, heads, "gelu", "no_norm", 1e-12)
    return result[..., order.argsort()]


# With a single hidden unit only the order within the FFN and the heads makes a difference.
@example(1, 3, [(0, 29), (0, 1), (1, 0)])
@example(1, 24, [(1, 0), (1, 0)])
@example(1, 27, [(0, 33), (2, 2), (1, 0)])
@example(1, 13, [(1, 8), (2, 0), (1, 0)])  # scores of 1e9 and more
@given(st.integers(1, 70), st.integers(1, 40), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=3))
def test_encoder_of_any_width(hidden, head_size, layers):
    """Layers without a norm that scales amplify each rounding: PyTorch's own error depends on the order of its sums."""
    heads, widths = [h for h, _ in layers], [w for _, w in layers]
    states, mask, weights, heads = encoder_case(2, 20, [20, 7], hidden, heads, widths, head_size)
    got = native(states, mask, weights, heads, norm="no_norm")
    oracle = reference.encoder(states, mask, weights, heads, "gelu", "no_norm", 1e-12)
    generator = torch.Generator().manual_seed(0)
    results = [in_any_order(states, mask, weights, heads, generator) for _ in range(8)]
    assert_as_exact_as_torch(got, max(results, key=lambda own: (own.double() - oracle).abs().max()), oracle)


@pytest.mark.parametrize("length", [9, 90])  # steps split among threads, and token panels
def test_head_sizes_may_differ_by_layer(isa, length):
    """Scratch memory has room for the widest layer, and no layer reads what another left."""
    heads, head_sizes = [3, 2, 0, 5, 1], [8, 40, 8, 16, 64]
    states, mask, _, _ = encoder_case(2, length, [length, length // 2])
    weights = []
    for count, head_size in zip(heads, head_sizes, strict=True):
        weights += random_layers([count], [33], head_size, states.shape[2], torch.float64, seed=head_size)
    got = native(states, mask, weights, heads)
    own = reference.encoder(states.float(), mask, [w.float() for w in weights], heads, "gelu", "layer_norm", 1e-12)
    assert_as_exact_as_torch(got, own, reference.encoder(states, mask, weights, heads, "gelu", "layer_norm", 1e-12))


@pytest.mark.parametrize("hidden", [64, 1024])  # rows of 1024 would share sets of the cache
def test_bits_do_not_depend_on_threads_or_batch(isa, threads, hidden):
    states, mask, weights, heads = encoder_case(3, 60, [60, 31, 2], hidden)
    threads(1)
    expected = native(states, mask, weights, heads)
    for count in (1, 2, 3, 8):
        threads(count)
        for _ in range(3):
            assert torch.equal(native(states, mask, weights, heads), expected)
        for row in range(3):
            alone = native(states[row : row + 1], mask[row : row + 1], weights, heads)
            assert torch.equal(alone, expected[row : row + 1])


def test_four_callers_at_once():
    case = encoder_case(3, 60, [60, 31, 2])
    expected = native(*case)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: native(*case), range(40))
        assert all(torch.equal(result, expected) for result in results)


def test_memory_stays_flat_over_mixed_lengths():
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc/self/statm")
    states, mask, weights, heads = encoder_case(4, 128, [128] * 4)
    weights = prepacked_layers([w.float() for w in weights])

    def run(count):
        for i in range(count):
            length = 1 + i * 37 % 128
            ops.encoder_prepacked(states[:, :length].float(), mask[:, :length], weights, heads, "gelu", "none", 0.0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = run(200)
    assert run(600) - before < 8 << 20


ALONE = """
import os, sys, torch
from test_encoder import encoder_case, native
case = encoder_case(3, 60, [60, 31, 2])
torch.set_num_threads(int(sys.argv[1]))
result = native(*case)
assert torch.isfinite(result).all()
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native(*case), result) else 1)
    assert os.waitpid(child, 0)[1] == 0
torch.save(result, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("threads", "mode", "environment"),
    [
        ("8", "plain", {"OMP_THREAD_LIMIT": "1"}),
        ("3", "plain", {"OMP_THREAD_LIMIT": "2"}),
        ("8", "plain", {"OMP_DYNAMIC": "true"}),
        ("1", "fork", {}),  # a pool that ran before a fork is gone after it: PyTorch's own limit with OpenMP
    ],
)
def test_fewer_threads_than_asked_for(tmp_path, threads, mode, environment):
    file = tmp_path / "result.pt"
    command = [sys.executable, "-c", ALONE, threads, mode, str(file)]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(file), native(*encoder_case(3, 60, [60, 31, 2])))


MANY = """
import torch
from test_encoder import encoder_case, native
case = encoder_case(64, 100, [100] * 63 + [7])
expected = native(*case)
for count in (65, 100, 500):
    torch.set_num_threads(count)
    assert torch.equal(native(*case), expected), count
"""


def test_many_threads():
    """More panels than a word has bits (parallel.h), and than a step has shares; three threads do the work of all."""
    run = subprocess.run(
        [sys.executable, "-c", MANY],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_THREAD_LIMIT": "3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask: expected bool, got float32"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, "attention_mask: expected"),
        ({"num_heads": [3, 2]}, "num_heads: expected a divisor of a third of 48 qkv features, got 3"),
        ({"num_heads": [2]}, "weights: expected 12 tensors for 1 layers, got 24"),
        ({"activation": "swish"}, "activation: expected"),
        ({"norm": "rms"}, "norm: expected"),
        ({"hidden_states": torch.zeros(2, 5, 9)}, r"weights\[0\]: expected \[2, 9, 32\], got \[2, 48, 32\]"),
        ({"hidden_states": torch.zeros(2, 5, 48).double()}, "hidden_states: expected float32, got float64"),
    ],
)
def test_encoder_prepacked_says_what_does_not_fit(changes, text):
    weights = prepacked_layers(random_layers([2, 2], [5, 6], 8, 48))
    arguments = {
        "hidden_states": torch.zeros(2, 5, 48),
        "attention_mask": None,
        "weights": weights,
        "num_heads": [2, 2],
        "activation": "gelu",
        "norm": "layer_norm",
        "eps": 1e-12,
        **changes,
    }
    with pytest.raises((ValueError, RuntimeError), match=rf"packedbert::encoder_prepacked: {text}"):
        ops.encoder_prepacked(**arguments)
