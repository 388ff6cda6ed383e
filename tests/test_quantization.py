"""int8 products: exact in integers, equal on every instruction set, bounded in what the rounding costs."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import ragged_qkv, random_layers

from packedbert import dispatch, ops, quantization, reference
from packedbert.quantization import QuantizedWeight, pack_quantized, quantize_rows, quantize_weight, unpack_quantized


def product(x, weight):
    """x W^T by the op, nothing added."""
    return ops.packed_linear(x, pack_quantized(weight), torch.zeros(weight.values.shape[0]))


def exact_weight(values, input_scale=None):
    """A weight of scale 1: the op's result is the integer sum."""
    out_features, in_features = values.shape
    ones = torch.ones(in_features) if input_scale is None else input_scale
    return QuantizedWeight(values.to(torch.int8), torch.ones(out_features), ones)


# ------------------------------------------------------------------------------------------------ the layout


@given(st.integers(0, 70), st.integers(0, 30))
def test_unpacking_undoes_packing(out_features, in_features):
    weight = quantize_weight(torch.randn(out_features, in_features), torch.rand(in_features) + 0.5)
    packed = pack_quantized(weight)
    assert packed.numel() == quantization.packed_size(out_features, in_features)
    again = unpack_quantized(packed, out_features, in_features)
    assert all(torch.equal(one, other) for one, other in zip(again, weight, strict=True))


def test_the_layout_is_the_native_librarys():
    assert quantization.PANEL_WIDTH == dispatch.NATIVE.PANEL_WIDTH


def test_a_weight_is_rounded_to_the_nearest_of_255_values():
    weight = torch.randn(5, 40) * torch.tensor([1e-30, 1e-3, 1.0, 1e3, 0.0])[:, None]
    quantized = quantize_weight(weight)
    assert quantized.values.abs().amax(1).tolist() == [127, 127, 127, 127, 0]
    error = (quantized.dequantize() - weight).abs()
    assert (error <= quantized.scale[:, None] * 0.5 * (1 + 1e-5)).all()


# --------------------------------------------------------------------------------------------- the integers


def integer_rows(rows, in_features, low, high):
    """Rows of integers, whose quantization is exact: each holds its extremes, `high - low` being 255."""
    x = np.random.default_rng(rows + in_features).integers(low, high + 1, (rows, in_features))
    x[:, 0], x[:, -1] = low, high
    return x.astype(np.int32)


@pytest.mark.parametrize("low", [-255, -128, -1, 0])
@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 64, 40), (13, 127, 33), (29, 768, 96), (6, 4096, 32)])
def test_integers_equal_numpys(isa, shape, low):
    rows, in_features, out_features = shape
    x = integer_rows(rows, in_features, low, low + 255)
    values = np.random.default_rng(out_features).integers(-127, 128, (out_features, in_features)).astype(np.int32)
    expected = x @ values.T  # int32
    got = product(torch.from_numpy(x).float(), exact_weight(torch.from_numpy(values)))
    np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))
    if in_features <= 512:
        assert np.abs(expected).max() < 2**24  # so float32 hides nothing


@pytest.mark.parametrize("inputs", [(0, 255), (-255, 0), (-128, 127)])
@pytest.mark.parametrize("weights", [(127, 127), (-127, -127), (127, -127)])
def test_extremes_neither_saturate_nor_overflow(isa, inputs, weights):
    """Every product is the largest there is; the sums are multiples of 2^12, so float32 holds them exactly."""
    for in_features in (4096, 65536):
        x = torch.tensor(inputs).repeat(in_features // 2).float().expand(7, -1).contiguous()
        x[1] = inputs[1]
        values = torch.tensor(weights).repeat(in_features // 2).expand(33, -1)
        expected = x.numpy().astype(np.int64) @ values.numpy().T.astype(np.int64)
        assert np.abs(expected).max() < 2**31
        got = product(x, exact_weight(values))
        np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))


@given(
    st.tuples(st.integers(0, 40), st.integers(0, 70), st.integers(0, 70)),
    st.sampled_from([1e-38, 1e-3, 1.0, 1e30]),
    st.integers(0, 2**31),
)
def test_the_kernel_equals_the_oracle_to_the_last_bit(shape, size, seed):
    rows, in_features, out_features = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator) * size
    smoothing = torch.rand(in_features, generator=generator) + 0.1
    weight = quantize_weight(torch.randn(out_features, in_features, generator=generator), smoothing)
    assert torch.equal(product(x, weight), quantization.quantized_product(x, weight))


def test_every_isa_gives_the_same_bits():
    x = torch.randn(31, 300) * torch.rand(300) * 3
    weight = quantize_weight(torch.randn(70, 300))
    best, results = dispatch.NATIVE.isa(), []
    for isa in dispatch.NATIVE.available_isas():
        dispatch.NATIVE.set_isa(isa)
        results.append(product(x, weight))
    dispatch.NATIVE.set_isa(best)
    assert all(torch.equal(result, results[0]) for result in results)


# ------------------------------------------------------------------------------------------- what rounding costs


@given(st.integers(1, 200), st.integers(0, 2**31))
def test_the_error_is_within_the_bound(in_features, seed):
    """|x^ w^ - x w| <= sum |x^ - x| |w^| + |x| |w^ - w|, and an input is off by at most a scale (half, and half of the
    zero point's rounding where it is clamped), a weight by half a scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, in_features, generator=generator)
    weight = torch.randn(9, in_features, generator=generator)
    quantized = quantize_weight(weight)
    _, scale = quantize_rows(x)
    rounded = quantized.dequantize().double()
    bound = (
        scale.double() * rounded.abs().sum(1) + 0.5 * x.abs().double().sum(1, keepdim=True) * quantized.scale.double()
    )
    error = (product(x, quantized).double() - x.double() @ weight.double().T).abs()
    assert (error <= bound * (1 + 1e-5)).all()


def test_smoothing_changes_nothing_but_the_rounding():
    x = torch.randn(20, 64)
    x[:, 5] *= 100  # an outlier channel, as BERT's norms have them
    weight = torch.randn(30, 64)
    exact = x @ weight.T
    smoothing = (x.abs().amax(0) / weight.abs().amax(0)).sqrt()
    plain, smooth = ((product(x, quantize_weight(weight, s)) - exact).norm() / exact.norm() for s in (None, smoothing))
    assert smooth < plain / 2
    assert smooth < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 3, 66])
def test_a_value_that_is_not_finite_makes_its_row_nan(isa, bad, place):
    x = torch.randn(4, 67)
    x[1, place] = bad
    weight = quantize_weight(torch.randn(9, 67))
    got = product(x, weight)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], product(x[[0, 2, 3]], weight))
    assert torch.equal(got.isnan(), quantization.quantized_product(x, weight).isnan())


# --------------------------------------------------------------------------------------------- epilogues, layers


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_epilogues(isa, activation, norm):
    for rows, in_features, out_features in itertools.product((0, 1, 13), (0, 5, 64), (1, 32, 47)):
        vector = None if norm == "none" else torch.randn(out_features)
        arguments = {
            "input": torch.randn(rows, in_features),
            "weight": pack_quantized(quantize_weight(torch.randn(out_features, in_features) * 0.3)),
            "bias": torch.randn(out_features),
            "activation": activation,
            "residual": torch.randn(rows, out_features),
            "norm": norm,
            "norm_weight": vector,
            "norm_bias": vector,
            "eps": 1e-5,
        }
        expected = reference.packed_linear(**arguments)
        torch.testing.assert_close(ops.packed_linear(**arguments), expected, rtol=2e-5, atol=2e-5)


def quantized_layers(num_heads, widths, hidden, mixed=False):
    """Weights as encoder_prepacked takes them, and as the reference does; with `mixed`, every other matrix is float."""
    matrices = 0
    prepacked, canonical = [], []
    for weight in random_layers(num_heads, widths, 8, hidden):
        if weight.dim() == 2:
            matrices += 1
            packed = pack_quantized(quantize_weight(weight))
            keep = mixed and matrices % 2
            prepacked.append(ops.prepack_linear(weight) if keep else packed)
            canonical.append(weight if keep else packed)
        else:
            prepacked.append(weight)
            canonical.append(weight)
    return prepacked, canonical


@pytest.mark.parametrize("attention", reference.ATTENTIONS)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 5), (3, 60)])
def test_encoder(isa, batch, length, mixed, attention):
    """Against the reference with the same rounding. A float that is off in the last bit may be rounded to the next
    integer, so single values differ by a step; on average they must not."""
    heads, hidden = [3, 0, 2], 64
    prepacked, canonical = quantized_layers(heads, [70, 33, 0], hidden, mixed)
    states = torch.randn(batch, length, hidden)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length // 2 + 1 :] = False
    settings = (heads, "gelu", "layer_norm", 1e-12)
    got = ops.encoder_prepacked(states, mask, prepacked, *settings, attention)
    expected = ops.encoder(states, mask, canonical, *settings, attention, "reference")
    difference = got - expected
    assert difference.abs().max() < 0.1
    assert difference.square().mean().sqrt() < 3e-3
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("attention", reference.ATTENTIONS)
def test_bits_do_not_depend_on_threads_or_batch(isa, threads, attention):
    heads, hidden = [3, 2], 64
    weights, _ = quantized_layers(heads, [70, 33], hidden, mixed=attention == "fp32")
    states = torch.randn(3, 60, hidden)
    mask = torch.arange(60) < torch.tensor([60, 31, 2])[:, None]
    settings = (weights, heads, "gelu", "layer_norm", 1e-12, attention)
    threads(1)
    expected = ops.encoder_prepacked(states, mask, *settings)
    for count in (1, 2, 3, 8):
        threads(count)
        assert torch.equal(ops.encoder_prepacked(states, mask, *settings), expected)
        for row in range(3):
            alone = ops.encoder_prepacked(states[row : row + 1], mask[row : row + 1], *settings)
            assert torch.equal(alone, expected[row : row + 1])


# -------------------------------------------------------------------------------------------------- attention


def float_qkv(*arguments):
    qkv, bounds = ragged_qkv(*arguments)
    return qkv.float(), bounds


def relative(got, expected):
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("head_size", [1, 7, 32, 64, 130])
def test_int8_attention(isa, head_size):
    """The kernel is the oracle, but where a float that is off in the last bit is rounded to the next integer."""
    qkv, bounds = float_qkv([0, 1, 33, 5, 100, 14], 3, head_size)
    got = ops.pruned_attention(qkv, bounds, 3, "int8")
    oracle = reference.pruned_attention(qkv, bounds, 3, "int8")
    exact = reference.pruned_attention(qkv, bounds, 3)
    assert (got - oracle).abs().max() < 0.02
    assert relative(got, oracle) < 1e-3
    assert relative(got, exact) < 0.03


@pytest.mark.parametrize(("length", "size"), [(511, 1.0), (513, 1.0), (1100, 0.2), (700, 3.0)])
def test_int8_attention_over_long_sequences(isa, length, size):
    qkv, bounds = float_qkv([length, 3], 1, 64, size)
    got = ops.pruned_attention(qkv, bounds, 1, "int8")
    assert relative(got, reference.pruned_attention(qkv, bounds, 1)) < 0.06


def test_int8_attention_of_scores_that_no_float_holds_to_within_1(isa):
    qkv, bounds = float_qkv([40, 3], 1, 32, 1e5)
    got = ops.pruned_attention(qkv, bounds, 1, "int8")
    assert relative(got, reference.pruned_attention(qkv, bounds, 1, "int8")) < 1e-3


@pytest.mark.parametrize("part", [0, 1, 2])
def test_int8_attention_shows_a_nan(isa, part):
    """In a query: that query's context. In a key or a value: all of the sequence. Never another sequence or head."""
    qkv, bounds = float_qkv([50, 20], 2, 16)
    clean = ops.pruned_attention(qkv, bounds, 2, "int8")
    qkv[7, part * 32 + 3] = float("nan")
    got = ops.pruned_attention(qkv, bounds, 2, "int8")
    touched = torch.zeros(70, 32, dtype=torch.bool)
    touched[7 if part == 0 else slice(50), :16] = True
    assert got[touched].isnan().all()
    assert torch.equal(got[~touched], clean[~touched])


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-36, 1e-34])
def test_int8_attention_to_values_next_to_nothing(isa, magnitude):
    """Places of the last group that no key has are never written: they must not be multiplied, by 255 least of all."""
    for length in (5, 8, 30):
        qkv, bounds = float_qkv([length], 2, 16)
        qkv[:, 64:] *= magnitude
        left_behind = [torch.full((size,), 1.2e20) for size in range(100, 40_000, 517)]
        del left_behind  # what scratch memory finds
        got = ops.pruned_attention(qkv, bounds, 2, "int8")
        off = (got - reference.pruned_attention(qkv, bounds, 2)).abs().max()
        assert off <= 0.05 * qkv[:, 64:].abs().max() + 2.0**-118


def test_int8_attention_has_the_same_bits_in_any_batch(isa):
    qkv, bounds = float_qkv([50, 9, 70], 2, 64)
    together = ops.pruned_attention(qkv, bounds, 2, "int8")
    for begin, end in itertools.pairwise(bounds.tolist()):
        alone = ops.pruned_attention(qkv[begin:end], torch.tensor([0, end - begin], dtype=torch.int32), 2, "int8")
        assert torch.equal(alone, together[begin:end])


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (torch.zeros(3, dtype=torch.int8), r"weight: expected \[\d+\], as pack_quantized returns it, got \[3\]"),
        (torch.zeros(quantization.packed_size(9, 8), dtype=torch.int8), r"weight: expected \[\d+\], as pack_quantized"),
    ],
)
def test_what_is_no_packed_weight_is_refused(weight, text):
    with pytest.raises((ValueError, RuntimeError), match="weight: expected"):
        torch.ops.packedbert.packed_linear(
            torch.zeros(2, 7), weight, torch.zeros(9), "none", None, "none", None, None, 0.0
        )
    with pytest.raises(ValueError, match=text):
        ops.packed_linear(torch.zeros(2, 7, device="meta"), weight.to("meta"), torch.zeros(9, device="meta"))
    with pytest.raises(ValueError, match="weight: expected int8"):
        unpack_quantized(weight, 9, 7)


def test_attention_says_what_does_not_fit():
    qkv, bounds = float_qkv([3], 1, 513)
    with pytest.raises(RuntimeError, match="precision: expected 'fp32' with heads of more than 512 dimensions"):
        ops.pruned_attention(qkv, bounds, 1, "int8")
    with pytest.raises((ValueError, RuntimeError), match="precision: expected one of"):
        ops.pruned_attention(qkv, bounds, 1, "int4")


def test_too_many_inputs_and_bad_smoothing():
    with pytest.raises(ValueError, match="at most 65536 inputs, got 65537"):
        quantize_weight(torch.zeros(1, 65537))
    for smoothing in (torch.zeros(4), torch.ones(3), torch.full((4,), float("nan"))):
        with pytest.raises(ValueError, match="smoothing: expected"):
            quantize_weight(torch.zeros(1, 4), smoothing)
