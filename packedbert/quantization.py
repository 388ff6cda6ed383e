"""int8 weights and inputs, in plain PyTorch: what the numbers mean, how they are packed, and the oracle of the product.

A weight W [out_features, in_features] is stored as int8 with a scale for each output (symmetric). Inputs are
quantized at run time, each row by itself to 0..255 (asymmetric: GELU's outputs are). Products are summed exactly.

Inputs with outliers in a few channels lose the others to rounding. SmoothQuant (Xiao et al., arXiv 2211.10438)
divides each input channel by a `smoothing` s and multiplies the weight's column by it, which changes nothing in exact
arithmetic. BERT is post-norm: what the norm puts out also feeds the residual, so s can't be folded into the norm, and
is applied when the inputs are quantized.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: The layout of a packed weight, as csrc/packed_layout.h defines it.
PANEL_WIDTH = 32
GROUP = 4

#: So many products can't overflow 32 bits.
MAX_INPUTS = 65536

#: The smallest scale: 255 over it is finite, and it over 255 is not subnormal.
_MIN_SCALE = 2.0**-118


class QuantizedWeight(NamedTuple):
    """W[n, k] = values[n, k] * scale[n] * input_scale[k], about."""

    values: Tensor  # int8 [out_features, in_features], -127 to 127
    scale: Tensor  # float32 [out_features]
    input_scale: Tensor  # float32 [in_features], 1 / smoothing: inputs are multiplied by it before they are quantized

    def dequantize(self) -> Tensor:
        """The weight that this stands for, float32 [out_features, in_features]."""
        return self.values.float() * self.scale[:, None] * self.input_scale


def quantize_weight(weight: Tensor, smoothing: Tensor | None = None) -> QuantizedWeight:
    """Round a weight to int8, each row with a scale of its own.

    Args:
        weight: [out_features, in_features], any floating dtype.
        smoothing: [in_features], positive; None: ones.

    Raises:
        ValueError: too many inputs, or a smoothing that doesn't fit.
    """
    out_features, in_features = weight.shape
    if in_features > MAX_INPUTS:
        raise ValueError(f"quantize_weight: expected at most {MAX_INPUTS} inputs, got {in_features}")
    input_scale = torch.ones(in_features, device=weight.device)
    if smoothing is not None:
        if smoothing.shape != (in_features,) or not bool(((smoothing > 0) & smoothing.isfinite()).all()):
            raise ValueError(
                f"smoothing: expected {[in_features]} positive numbers, got {list(smoothing.shape)} from "
                f"{smoothing.min() if smoothing.numel() else None}"
            )
        input_scale = 1 / smoothing.float()
    smoothed = weight.detach().float() / input_scale
    largest = smoothed.abs().amax(1) if in_features else smoothed.new_zeros(out_features)
    scale = (largest / 127).clamp_min(_MIN_SCALE)
    values = (smoothed / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight(values, scale, input_scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of x to integers: x is about integers * scale.

    Args:
        x: float32 [..., features].

    Returns: integers, float32 [..., features], of a range of 255 around 0 that includes it; scale, float32 [..., 1].
    Where a row has a NaN or an infinity, its integers are 0 and its scale is a NaN.
    """
    sound = x.isfinite().all(-1, keepdim=True)
    x = x.masked_fill(~sound, 0)
    if x.shape[-1] == 0:
        return x, x.new_full((*x.shape[:-1], 1), _MIN_SCALE)
    low = x.amin(-1, keepdim=True).clamp_max(0)
    high = x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(_MIN_SCALE)
    inverse = 1 / scale
    zero_point = (-low * inverse).round()
    integers = torch.maximum(torch.minimum((x * inverse).round(), 255 - zero_point), -zero_point)
    return integers, scale.masked_fill(~sound, torch.nan)


def quantized_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T with quantized inputs and an exact sum: the oracle of the kernels, to the last bit.

    Args:
        x: [..., in_features], any floating dtype.
        weight: W.

    Returns: [..., out_features] in x's dtype.
    """
    integers, scale = quantize_rows(x.float() * weight.input_scale)
    sums = F.linear(integers.double(), weight.values.double())  # below 2^53: exact
    return (sums.float() * (scale * weight.scale)).to(x.dtype)


def _quantize_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to -127..127; also the scale [..., 1], a NaN where the row has something that is not finite."""
    sound = x.isfinite().all(-1, keepdim=True)
    x = x.masked_fill(~sound, 0)
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(_MIN_SCALE)
    return (x * (1 / scale)).round().clamp(-127, 127), scale.masked_fill(~sound, torch.nan)


def quantized_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_size)) v with both products in int8: what the kernels approximate attention by.

    Queries are rounded as the inputs of a linear layer, keys and values to -127..127, each with a scale of its own.
    The values' scales go into the probabilities, which then are rounded to 0..255, the largest possible being 255.

    Args:
        q: [..., tokens, head_size]; k and v the same.

    Returns: [..., tokens, head_size] in q's dtype.
    """
    if 0 in q.shape:
        return torch.zeros_like(q)
    q_integers, q_scale = quantize_rows(q.float())
    k_integers, k_scale = _quantize_symmetric(k.float())
    v_integers, v_scale = _quantize_symmetric(v.float())
    sums = q_integers.double() @ k_integers.double().transpose(-1, -2)
    scores = sums.float() * (q_scale * k_scale.transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    largest = v_scale.amax(-2, keepdim=True)
    integers = (weights * (v_scale.transpose(-1, -2) * (255 / largest))).round().clamp(0, 255)
    context = (integers.double() @ v_integers.double()).float() * (largest / 255)
    return (context / weights.sum(-1, keepdim=True)).to(q.dtype)


# --------------------------------------------------------------------------------- what to smooth, what to skip

#: skip="auto" leaves a matrix in float32 if its int8 outputs on the calibration's data are off by more than this, as a
#: root mean square relative to the outputs'.
MAX_ERROR = 0.05

#: The exponents of SmoothQuant that are tried for each matrix, beside no smoothing.
_STRENGTHS = (0.3, 0.5, 0.7)


class Observed(NamedTuple):
    """The inputs of one matrix on calibration data."""

    largest: Tensor  # float32 [in_features]: the largest absolute value of each channel
    rows: Tensor  # float32 [at most calibration.KEPT_ROWS, in_features]: a sample of them


#: What `packedbert.calibrate` returns. BERT's name in the model ("" if it is the model) -> matrix ("3.down") -> inputs.
Calibration = dict[str, dict[str, Observed]]


class QuantizationPlan(NamedTuple):
    """How to quantize the matrices of an encoder."""

    weights: dict[str, QuantizedWeight]  # by name; one that is left out stays in float32
    errors: dict[str, float]  # relative error of the outputs on the calibration's data; empty without it


def relative_error(rows: Tensor, weight: Tensor, quantized: QuantizedWeight) -> float:
    """Root mean square error of the quantized product on `rows`, relative to that product's own."""
    exact = F.linear(rows, weight)
    return ((quantized_product(rows, quantized) - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _smoothing(largest: Tensor, weight: Tensor, strength: float) -> Tensor:
    """SmoothQuant's s = max|X|^strength / max|W|^(1 - strength), channel by channel; 1 where either is 0."""
    columns = weight.abs().amax(0)
    s = largest**strength / columns ** (1 - strength)
    return torch.where((largest > 0) & (columns > 0), s, torch.ones_like(s)).clamp(1e-4, 1e4)


def is_skipped(name: str, skip: Collection[str]) -> bool:
    """Whether `skip` names that matrix ("3.down") or its layer ("3")."""
    return name in skip or name.split(".")[0] in skip


def plan_quantization(
    weights: dict[str, Tensor], skip: str | tuple[str, ...], observed: dict[str, Observed] | None
) -> QuantizationPlan:
    """Quantize what isn't skipped; with calibration, with the smoothing that is most exact on its data.

    Args:
        weights: matrix ("3.down") -> [out_features, in_features].
        skip: "auto", or names of layers and matrices.
        observed: the inputs of each on calibration data, or None.

    Raises:
        ValueError: a name in `skip` that isn't there; a calibration of another model.
    """
    quantized, errors = {}, {}
    unknown = set() if skip == "auto" else set(skip) - weights.keys() - {name.split(".")[0] for name in weights}
    if unknown:
        raise ValueError(f"skip: expected layers or matrices of this model, got {', '.join(sorted(unknown))}")
    for name, weight in weights.items():
        if skip != "auto" and is_skipped(name, skip):
            continue
        weight = weight.float()
        if observed is None or 0 in weight.shape:
            quantized[name] = quantize_weight(weight)
            continue
        seen = observed.get(name)
        if seen is None or seen.largest.shape[0] != weight.shape[1]:
            raise ValueError(
                f"calibration: expected one of this model, got one with "
                f"{'nothing' if seen is None else f'{seen.largest.shape[0]} inputs'} for {name} {list(weight.shape)}"
            )
        smoothings = [None, *(_smoothing(seen.largest, weight, strength) for strength in _STRENGTHS)]
        candidates = [quantize_weight(weight, smoothing) for smoothing in smoothings]
        by_error = [(relative_error(seen.rows, weight, candidate), index) for index, candidate in enumerate(candidates)]
        errors[name], best = min(by_error)
        if skip != "auto" or errors[name] <= MAX_ERROR:
            quantized[name] = candidates[best]
    return QuantizationPlan(quantized, errors)


# ------------------------------------------------------------------------------------------- the packed layout


def packed_size(out_features: int, in_features: int) -> int:
    """Bytes of a packed weight."""
    panels, groups = -(-out_features // PANEL_WIDTH), -(-in_features // GROUP)
    return panels * PANEL_WIDTH * (groups * GROUP + 8) + in_features * 4


def pack_quantized(weight: QuantizedWeight) -> Tensor:
    """All of a quantized weight in one tensor, laid out as csrc/packed_layout.h says.

    Returns: int8 [packed_size].
    """
    out_features, in_features = weight.values.shape
    more_rows, more_columns = -out_features % PANEL_WIDTH, -in_features % GROUP
    values = F.pad(weight.values, (0, more_columns, 0, more_rows))
    rows, columns = values.shape
    panels = values.view(rows // PANEL_WIDTH, PANEL_WIDTH, columns // GROUP, GROUP).transpose(1, 2)
    parts = (
        panels.contiguous(),
        F.pad(weight.scale, (0, more_rows)),
        values.sum(1, dtype=torch.int32),
        weight.input_scale,
    )
    return torch.cat([part.contiguous().flatten().view(torch.int8) for part in parts])


def unpack_quantized(packed: Tensor, out_features: int, in_features: int) -> QuantizedWeight:
    """What `pack_quantized` packed, bit for bit.

    Raises:
        ValueError: not of that size.
    """
    size = packed_size(out_features, in_features)
    if packed.dtype != torch.int8 or list(packed.shape) != [size]:
        raise ValueError(
            f"weight: expected int8 [{size}], a packed {[out_features, in_features]} weight, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    rows, groups = -(-out_features // PANEL_WIDTH) * PANEL_WIDTH, -(-in_features // GROUP)
    bytes_of_panels, scale, _, input_scale = packed.split([rows * groups * GROUP, rows * 4, rows * 4, in_features * 4])
    panels = bytes_of_panels.view(rows // PANEL_WIDTH, groups, PANEL_WIDTH, GROUP).transpose(1, 2)
    values = panels.reshape(rows, groups * GROUP)
    return QuantizedWeight(
        values[:out_features, :in_features].contiguous(),
        scale.clone().view(torch.float32)[:out_features].contiguous(),
        input_scale.clone().view(torch.float32),
    )
