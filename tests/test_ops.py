"""Every op: what it computes against the oracle in float64, opcheck, and what it refuses."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import HIDDEN, assert_as_exact_as_torch, prepacked_layers, random_layers
from torch.fx.experimental.proxy_tensor import make_fx

from packedbert import dispatch, ops, prepack, reference
from packedbert.prepack import PreparedEncoder, allocate_together
from packedbert.reference import ACTIVATIONS, MATRICES, NORMS, LayerWeights


def linear_arguments(rows=5, in_features=7, out_features=9, activation="gelu", norm="layer_norm", residual=True):
    """Arguments of packed_linear, the weight canonical, in float64."""
    generator = torch.Generator().manual_seed(rows * 31 + in_features)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "input": randn(rows, in_features),
        "weight": randn(out_features, in_features) * 0.5,
        "bias": randn(out_features),
        "activation": activation,
        "residual": randn(rows, out_features) if residual else None,
        "norm": norm,
        "norm_weight": None if norm == "none" else randn(out_features),
        "norm_bias": None if norm == "none" else randn(out_features),
        "eps": 1e-5,
    }


def in_float32(arguments):
    return {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def prepacked(arguments):
    return {**arguments, "weight": ops.prepack_linear(arguments["weight"])}


def embedding_arguments(batch=2, length=3, hidden_size=HIDDEN, norm="layer_norm", types=True):
    """Arguments of embed, in float64."""
    generator = torch.Generator().manual_seed(batch * 31 + length)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "input_ids": torch.randint(0, 11, (batch, length), generator=generator),
        "token_type_ids": torch.randint(0, 2, (batch, length), generator=generator) if types else None,
        "words": randn(11, hidden_size),
        "types": randn(2, hidden_size),
        "positions": randn(max(length, 1), hidden_size),
        "norm": norm,
        "norm_weight": randn(hidden_size),
        "norm_bias": randn(hidden_size),
        "eps": 1e-5,
    }


# ---------------------------------------------------------------------------------------------- the results


@pytest.mark.parametrize("isa", dispatch.NATIVE.available_isas() if dispatch.NATIVE else [])
@pytest.mark.parametrize("norm", ["layer_norm", "no_norm"])
def test_embed_on_every_isa(isa, norm):
    best = dispatch.NATIVE.isa()
    dispatch.NATIVE.set_isa(isa)
    try:
        for batch, length, hidden_size in itertools.product((0, 1, 5), (0, 1, 7), (1, 17, 32, 47)):
            exact = embedding_arguments(batch, length, hidden_size, norm, types=length != 1)
            single = in_float32(exact)
            single["input_ids"] = exact["input_ids"].T.contiguous().T  # any strides
            assert_as_exact_as_torch(ops.embed(**single), reference.embed(**single), reference.embed(**exact))
    finally:
        dispatch.NATIVE.set_isa(best)


@pytest.mark.parametrize("isa", dispatch.NATIVE.available_isas() if dispatch.NATIVE else [])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_linear_on_every_isa(isa, activation, norm):
    best = dispatch.NATIVE.isa()
    dispatch.NATIVE.set_isa(isa)
    try:
        assert dispatch.NATIVE.isa() == isa  # the force took
        for rows, in_features, out_features in itertools.product((0, 1, 13, 15), (0, 1, 7, 64), (0, 1, 32, 47)):
            exact = linear_arguments(rows, in_features, out_features, activation, norm, residual=rows % 2 == 1)
            single = in_float32(exact)
            got = ops.packed_linear(**prepacked(single))
            assert_as_exact_as_torch(got, reference.packed_linear(**single), reference.packed_linear(**exact))
    finally:
        dispatch.NATIVE.set_isa(best)


@given(
    st.tuples(st.integers(0, 40), st.integers(0, 70), st.integers(0, 70)),
    st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from(NORMS),
    st.booleans(),
)
def test_packed_linear_on_any_shape(shape, activation, norm, residual):
    exact = linear_arguments(*shape, activation, norm, residual)
    single = in_float32(exact)
    got = ops.packed_linear(**prepacked(single))
    assert_as_exact_as_torch(got, reference.packed_linear(**single), reference.packed_linear(**exact))


@pytest.mark.parametrize("in_features", [31, 33, 767, 769, 1600])
@pytest.mark.parametrize("rows", [15, 17, 32, 33, 129, 260])
def test_sums_and_rows_across_tiles(isa, rows, in_features):
    """Around the sizes of AMX's tiles, strips and units, and of the blocks that long sums are taken in."""
    exact = linear_arguments(rows, in_features, 33, "none", "none", residual=False)
    single = in_float32(exact)
    got = ops.packed_linear(**prepacked(single))
    # Of the numbers that float32 has: rounding the arguments is nobody's error.
    oracle = reference.packed_linear(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in single.items()})
    assert_as_exact_as_torch(got, reference.packed_linear(**single), oracle)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_float_products_have_no_range_of_their_own(isa, size):
    """AMX adds up six products of bfloat16 parts, each of which may be too small where its number is not."""
    inputs, parts = 65, 6
    exact = linear_arguments(20, inputs, 33, "none", "none", residual=False)
    single = in_float32(exact)
    single["input"] *= size
    single["weight"] *= 1e-3
    single["bias"].zero_()
    got = ops.packed_linear(**prepacked(single))
    oracle = single["input"].double() @ single["weight"].double().T
    own = single["input"] @ single["weight"].T
    error, largest = (got.double() - oracle).abs().max(), oracle.abs().max()
    float32 = torch.finfo(torch.float32)
    lost = inputs * parts * float32.tiny if isa == "avx512_amx" else 0
    assert error <= 2 * (own.double() - oracle).abs().max() + 2 * float32.eps * largest + lost


def test_an_infinite_weight_or_input_is_never_hidden(isa):
    single = in_float32(linear_arguments(40, 70, 33, "none", "none", residual=False))
    single["weight"][3, 5] = float("inf")
    single["input"][7, 2] = float("-inf")
    got = ops.packed_linear(**prepacked(single))
    assert not torch.isfinite(got[:, 3]).any()
    assert not torch.isfinite(got[7]).any()
    assert torch.isfinite(got[torch.arange(40) != 7][:, torch.arange(33) != 3]).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], ids=hex)
def test_no_nan_becomes_a_number(isa, bits):
    """Whatever its other bits are: rounding some of them carries into the sign."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    single = in_float32(linear_arguments(40, 70, 33, "none", "none", residual=False))
    single["weight"][3, 5] = nan
    single["input"][7, 2] = nan
    got = ops.packed_linear(**prepacked(single))
    assert got[:, 3].isnan().all()
    assert got[7].isnan().all()
    assert torch.isfinite(got[torch.arange(40) != 7][:, torch.arange(33) != 3]).all()


def test_packed_linear_takes_leading_dimensions_and_strides():
    exact = linear_arguments(rows=12, residual=False)
    single = prepacked(in_float32(exact))
    single["input"] = single["input"].view(3, 4, 7).transpose(0, 1)
    expected = reference.packed_linear(**{**exact, "input": exact["input"].view(3, 4, 7).transpose(0, 1)})
    torch.testing.assert_close(ops.packed_linear(**single).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation, isa):
    """An identity weight shows the activation alone: large, small and denormal arguments."""
    values = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30])])
    exact = ACTIVATIONS[activation](values.double())
    got = ops.packed_linear(
        values[:, None], ops.prepack_linear(torch.ones(1, 1)), torch.zeros(1), activation=activation
    )[:, 0]
    assert (got.double() - exact).abs().div(exact.abs().clamp(min=1)).max() < 1e-6
    far = got[values.abs() > 1]
    assert not ((far != 0) & (far.abs() < torch.finfo(torch.float32).tiny)).any()  # subnormal numbers are slow


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_row_and_is_seen(activation, norm):
    single = in_float32(linear_arguments(4, 7, 9, activation, norm, residual=False))
    single["input"][1, 3] = float("nan")
    got = ops.packed_linear(**prepacked(single))
    assert got[1].isnan().all()
    assert torch.isfinite(got[[0, 2, 3]]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_give_the_limit(activation, isa):
    values = torch.tensor([[float("inf")], [float("-inf")]])
    got = ops.packed_linear(values, ops.prepack_linear(torch.ones(1, 1)), torch.zeros(1), activation=activation)
    assert got[0] == float("inf")
    assert got[1] == float("-inf") if activation == "none" else -1e-30 < got[1] <= 0


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 5))
def test_pruned_attention_is_softmax_within_sequences(lengths, heads, head_size):
    bounds = [0, *itertools.accumulate(lengths)]
    qkv = torch.randn(bounds[-1], 3 * heads * head_size, dtype=torch.float64)
    got = ops.pruned_attention(qkv.float(), torch.tensor(bounds, dtype=torch.int32), heads)
    expected = torch.empty(bounds[-1], heads * head_size, dtype=torch.float64)
    q, k, v = qkv.view(bounds[-1], 3, heads, head_size).unbind(1)
    for start, end in itertools.pairwise(bounds):
        for head in range(heads):
            scores = q[start:end, head] @ k[start:end, head].T / head_size**0.5
            columns = slice(head * head_size, (head + 1) * head_size)
            expected[start:end, columns] = scores.softmax(-1) @ v[start:end, head]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@given(st.data())
def test_encoder_on_any_mask(backend, data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    num_heads = data.draw(st.lists(st.integers(0, 3), min_size=0, max_size=2))
    widths = [data.draw(st.integers(0, 9)) for _ in num_heads]
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)))
    mask = data.draw(st.sampled_from([None, mask.view(batch, length), mask.view(batch, length).float()]))
    hidden = torch.randn(batch, length, HIDDEN, dtype=torch.float64)
    norm = data.draw(st.sampled_from(["layer_norm", "no_norm"]))
    exact, single = (random_layers(num_heads, widths, dtype=dtype) for dtype in (torch.float64, torch.float32))
    oracle = reference.encoder(hidden, mask, exact, num_heads, "gelu", norm, 1e-12)
    own = reference.encoder(hidden.float(), mask, single, num_heads, "gelu", norm, 1e-12)
    got = ops.encoder(hidden.float(), mask, single, num_heads, "gelu", norm, 1e-12, backend=backend)
    assert_as_exact_as_torch(got, own, oracle)
    if mask is not None:
        assert (got[mask == 0] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_stands_at_padded_positions_does_not_matter(backend):
    weights, mask = random_layers([2], [5]), torch.tensor([[1, 0, 1], [0, 0, 0]])
    hidden = torch.randn(2, 3, HIDDEN)
    clean = ops.encoder(hidden, mask, weights, [2], backend=backend)
    hidden[mask == 0] = float("nan")
    dirty = ops.encoder(hidden, mask, weights, [2], backend=backend)
    assert torch.equal(clean, dirty)
    assert torch.equal(
        reference.encoder(hidden, mask, weights, [2], "gelu", "layer_norm", 1e-12)[1], torch.zeros(3, HIDDEN)
    )


# --------------------------------------------------------------------------------- citizens of torch.library


def opcheck_cases():
    """Op name -> list of (args, kwargs)."""
    single = prepacked(in_float32(linear_arguments()))
    plain = prepacked(in_float32(linear_arguments(norm="none", residual=False, activation="none")))
    qkv, bounds = torch.randn(6, 3 * 2 * 4), torch.tensor([0, 2, 6], dtype=torch.int32)
    hidden, mask = torch.randn(2, 3, HIDDEN), torch.tensor([[1, 1, 1], [1, 0, 0]])
    weights = random_layers([2, 0], [5, 3])
    embeddings = in_float32(embedding_arguments())
    return {
        "embed": [((), embeddings), ((), {**embeddings, "norm": "no_norm", "token_type_ids": None})],
        "prepack_linear": [((torch.randn(9, 7),), {}), ((torch.randn(0, 7),), {})],
        "packed_linear": [((), single), ((), plain)],
        "pruned_attention": [
            ((qkv, bounds, 2, "fp32"), {}),
            ((torch.randn(6, 0), bounds, 0, "fp32"), {}),
            ((qkv, bounds, 2, "int8"), {}),
        ],
        "encoder_prepacked": [
            ((hidden, None, prepacked_layers(weights), [2, 0], "gelu", "layer_norm", 1e-12, "fp32"), {}),
            ((hidden, mask != 0, prepacked_layers(weights), [2, 0], "relu", "no_norm", 0.0, "int8"), {}),
        ],
        "encoder": [
            ((hidden, mask, weights, [2, 0], "gelu", "layer_norm", 1e-12, "fp32", "auto", 0), {}),
            ((hidden, None, weights, [2, 0], "relu", "no_norm", 0.0, "fp32", "reference", 0), {}),
        ],
    }


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, cases in opcheck_cases().items() for i in range(len(cases))]
)
def test_opcheck(name, index):
    args, kwargs = opcheck_cases()[name][index]
    torch.library.opcheck(getattr(torch.ops.packedbert, name).default, args, kwargs)


def test_every_op_is_checked():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("packedbert::")
    }
    # Those four are for eager calls, and have no fake kernels: test_prepared_encoder, test_shortcut.py.
    eager = {"prepare_encoder", "encoder_prepared", "prepare_bert", "bert_prepared"}
    assert registered == set(opcheck_cases()) | eager


def test_ops_have_no_silent_gradient():
    single = prepacked(in_float32(linear_arguments()))
    single["input"].requires_grad_()
    with pytest.raises(RuntimeError, match="packed_linear has no gradient: call the function of that name"):
        ops.packed_linear(**single).sum().backward()


# -------------------------------------------------------------------------------------------------- the cache


def test_the_cache_follows_the_weights():
    weights, hidden, cache = random_layers([1], [4]), torch.randn(1, 3, HIDDEN), ops.PrepackCache()

    def run():
        return ops.encoder(hidden, None, weights, [1], backend="cpu", cache=cache.key)

    def fresh():
        return ops.encoder(hidden, None, weights, [1], backend="cpu")

    first = run()
    assert torch.equal(first, fresh())
    up = LayerWeights._fields.index("up_weight")
    weights[up].mul_(2)  # in place
    assert not torch.equal(run(), first)
    assert torch.equal(run(), fresh())
    weights[up] = torch.randn_like(weights[up])  # replaced
    assert torch.equal(run(), fresh())
    weights[up].data.mul_(2)  # not counted by PyTorch: documented
    assert not torch.equal(run(), fresh())
    cache.clear()
    assert torch.equal(run(), fresh())


@pytest.mark.skipif(dispatch.NATIVE is None, reason="the native library is not built")
def test_prepared_encoder():
    """Every way of changing a weight that PyTorch counts is seen, in all of them; and a released encoder is gone."""
    weights, hidden, cache = random_layers([1, 1], [4, 3]), torch.randn(1, 3, HIDDEN), ops.PrepackCache()
    mask = torch.tensor([[1, 0, 1]])

    def run(**changes):
        arguments = {"num_heads": [1, 1], "activation": "gelu", "cache": cache.key, **changes}
        return ops.encoder(hidden, mask, weights, backend="cpu", **arguments)

    run()
    key = cache.prepared.key
    run()
    assert cache.prepared.key == key  # nothing changed: nothing is prepared
    for index, weight in enumerate(weights):
        for change in ("in place", "replaced", "other memory", "swapped"):
            before = run()
            if change == "in place":
                weights[index].mul_(1.5).add_(0.25)
            elif change == "replaced":
                weights[index] = torch.randn(weight.shape)
            elif change == "other memory":
                weights[index].data = torch.randn(weight.shape)
            else:
                torch.utils.swap_tensors(weights[index], torch.randn(weight.shape))
            after = run()
            # A softmax doesn't see the keys' bias.
            assert not torch.equal(after, before), (index, change)
            assert torch.equal(after, run(cache=0)), (index, change)
    assert torch.equal(run(activation="relu"), run(activation="relu", cache=0))

    key = cache.prepared.key
    cache.clear()
    with pytest.raises(RuntimeError, match="encoder_prepared: key: expected one of prepare_encoder, got"):
        torch.ops.packedbert.encoder_prepared(hidden, None, key)
    with pytest.raises(RuntimeError, match=r"prepare_encoder: weights: expected 12 tensors for 1 layers, got 24"):
        torch.ops.packedbert.prepare_encoder(weights, [1], "gelu", "none", 0.0, "fp32")
    settings = ((1, 1), "gelu", "layer_norm", 1e-12, "fp32")
    prepared = PreparedEncoder(weights, settings, lambda: prepacked_layers(weights))
    with pytest.raises(RuntimeError, match=r"hidden_states: expected \[batch, length, \d+\], got \[1, 3, 5\]"):
        torch.ops.packedbert.encoder_prepared(torch.zeros(1, 3, 5), None, prepared.key)


def test_allocate_together():
    kinds = [((3, 5), torch.float32), ((0, 4), torch.float32), ((7,), torch.int8), ((2, 1), torch.float32)]
    tensors = allocate_together(kinds)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] == kinds
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors if tensor.numel() > 0)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))  # none overlaps another
    assert [tensor.shape for tensor in allocate_together([((0,), torch.int8)])] == [(0,)]
    assert allocate_together([]) == []


@pytest.mark.skipif(dispatch.NATIVE is None, reason="the native library is not built")
def test_weights_that_pytorch_does_not_count(monkeypatch):
    with torch.inference_mode():
        weights = random_layers([1], [4])
    settings = ((1,), "gelu", "layer_norm", 1e-12, "fp32")
    prepared = PreparedEncoder(weights, settings, lambda: prepacked_layers(weights))
    with monkeypatch.context() as patch:
        patch.setattr(prepack, "_version", None)  # what asks each, after an exception
        assert prepared.fits(weights, settings)
    counted = torch.from_numpy(weights[0].numpy())
    assert counted.data_ptr() == weights[0].data_ptr()
    torch.utils.swap_tensors(weights[0], counted)
    assert not prepared.fits(weights, settings)


@pytest.mark.skipif(dispatch.NATIVE is None, reason="the native library is not built")
def test_copies_of_weights_lie_together():
    weights, hidden, cache = random_layers([1, 1], [4, 3]), torch.randn(1, 3, HIDDEN), ops.PrepackCache()

    def copies():
        ops.encoder(hidden, None, weights, [1, 1], backend="cpu", cache=cache.key)
        return [entry.prepacked for _, entry in sorted(cache._entries.items())]

    before = copies()
    assert len(before) == 2 * len(MATRICES)
    assert len({copy.untyped_storage().data_ptr() for copy in before}) == 1
    weights[0].mul_(2)
    kept = before[0].clone()
    after = copies()
    # A call that is in progress may still read the old copy.
    assert torch.equal(before[0], kept)
    assert torch.equal(after[0], 2 * kept)
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(after, before, strict=True)] == [False] + [True] * 7


@pytest.mark.skipif(dispatch.NATIVE is None, reason="the native library is not built")
def test_a_weight_that_changes_while_it_is_prepared():
    weights, hidden, cache = random_layers([1], [4]), torch.randn(1, 3, HIDDEN), ops.PrepackCache()
    changes = iter([lambda: weights[0].mul_(2)])

    def native():
        packed = prepacked_layers(weights)
        next(changes, lambda: None)()  # as another thread might, after the copy was made
        return packed

    settings = ((1,), "gelu", "layer_norm", 1e-12, "fp32")
    cache.encoder(weights, settings, native)
    key = cache.encoder(weights, settings, native).key
    fresh = ops.encoder(hidden, None, weights, [1], backend="cpu")
    assert torch.equal(torch.ops.packedbert.encoder_prepared(hidden, None, key), fresh)


@pytest.mark.skipif(dispatch.NATIVE is None, reason="the native library is not built")
def test_what_records_an_encoder_sees_its_weights():
    weights, hidden, cache = random_layers([1], [4]), torch.randn(1, 3, HIDDEN), ops.PrepackCache()

    def run(states):
        return ops.encoder(states, None, weights, [1], backend="cpu", cache=cache.key)

    run(hidden)  # an encoder is prepared
    graph = make_fx(run)(hidden).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.packedbert.encoder.default]
    traced = torch.jit.trace(run, (hidden,), check_trace=False)
    assert "encoder_prepared" not in str(traced.graph)
    weights[0].mul_(2)
    assert torch.equal(traced(hidden), run(hidden))


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weight": torch.zeros(1, 8, 32)}, "weight"),
        ({"bias": torch.zeros(9, 1)}, "bias"),
        ({"activation": "swish"}, "activation"),
        ({"norm": "rms"}, "norm"),
        ({"norm_weight": None}, "norm_weight"),
        ({"norm_bias": torch.zeros(8)}, "norm_bias"),
        ({"residual": torch.zeros(4, 9)}, "residual"),
        ({"input": torch.zeros(5, 7, dtype=torch.float64)}, "input"),
    ],
)
def test_packed_linear_says_what_does_not_fit(changes, text):
    arguments = {**prepacked(in_float32(linear_arguments())), **changes}
    with pytest.raises((ValueError, RuntimeError), match=rf"packedbert::packed_linear: {text}: expected .*, got "):
        ops.packed_linear(**arguments)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.int64)}, "input_ids: expected at most 3 positions"),
        ({"input_ids": torch.full((2, 3), 11)}, "input_ids: expected 0 to 10"),
        ({"token_type_ids": torch.full((2, 3), -1)}, "token_type_ids: expected 0 to 1"),
        ({"token_type_ids": torch.zeros(1, 3, dtype=torch.int64)}, "token_type_ids"),
        ({"words": torch.zeros(7)}, "words"),
        ({"types": torch.zeros(2, HIDDEN - 1)}, "types"),
        ({"positions": torch.zeros(3, HIDDEN, dtype=torch.float64)}, "positions"),
        ({"norm_bias": torch.zeros(1)}, "norm_bias"),
        ({"norm": "rms"}, "norm"),
    ],
)
@pytest.mark.skipif(dispatch.NATIVE is None, reason="the native library is not built")
def test_embed_says_what_does_not_fit(changes, text):
    with pytest.raises((ValueError, RuntimeError), match=rf"packedbert::embed: {text}.*, got "):
        ops.embed(**{**in_float32(embedding_arguments()), **changes})


@pytest.mark.parametrize(
    ("qkv", "bounds", "heads", "text"),
    [
        (torch.zeros(4, 7), torch.tensor([0, 4], dtype=torch.int32), 1, "qkv"),
        (torch.zeros(4, 6), torch.tensor([0, 4]), 1, "cu_seqlens"),
        (torch.zeros(4, 6), torch.tensor([0, 3], dtype=torch.int32), 1, "cu_seqlens"),
        (torch.zeros(4, 6), torch.tensor([0, 3, 2, 4], dtype=torch.int32), 1, "cu_seqlens"),
        (torch.zeros(4, 6), torch.tensor([0, 4], dtype=torch.int32), -1, "num_heads"),
    ],
)
def test_pruned_attention_says_what_does_not_fit(qkv, bounds, heads, text):
    with pytest.raises((ValueError, RuntimeError), match=rf"packedbert::pruned_attention: {text}: expected .*, got "):
        ops.pruned_attention(qkv, bounds, heads)


def test_encoder_says_what_does_not_fit():
    weights, hidden = random_layers([1], [4]), torch.zeros(2, 3, HIDDEN)
    with pytest.raises(ValueError, match=r"encoder: attention_mask: expected \[2, 3\] or None, got \[2, 4\]"):
        ops.encoder(hidden, torch.ones(2, 4), weights, [1])
    with pytest.raises(ValueError, match=r"encoder: weights: expected 12 tensors for 1 layers, got 11"):
        ops.encoder(hidden, None, weights[1:], [1])
    with pytest.raises(ValueError, match=r"backend: expected one of auto, cpu, cuda, triton, reference, got 'tpu'"):
        ops.encoder(hidden, None, weights, [1], backend="tpu")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' was asked for, but the model is in torch\.float64"):
        ops.encoder(hidden.double(), None, [w.double() for w in weights], [1], backend="cpu")
