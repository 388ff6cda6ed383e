"""Dense weights + plan -> packed weights. Pure: the dense tensors are read, never written or aliased."""

import math

import torch
from torch import Tensor

from .reference import ACTIVATIONS, LayerWeights
from .structure import DenseLayer, LayerPlan


def _fold(bias: Tensor, columns: Tensor, constants: Tensor) -> Tensor:
    """bias + columns @ constants, rounded once: a bias that nothing is added to keeps its value.

    Args:
        bias: [N].
        columns: [N, R], the output columns of the R removed units.
        constants: [R], what these units put out for every token.
    """
    return (bias.double() + columns.double() @ constants.double()).to(bias.dtype)


def places_of(plan: LayerPlan, dimensions: tuple[tuple[int, ...], ...], head_size: int) -> Tensor:
    """Where the kept dimensions of the kept heads lie among the stored ones.

    Args:
        plan: which heads, and how wide they become.
        dimensions: those that are kept of each.
        head_size: as stored.

    Returns: int64 [heads * plan.head_size], -1 where a head is padded.
    """
    places = torch.full((len(plan.heads), plan.head_size), -1)
    for row, head, kept in zip(places, plan.heads, dimensions, strict=True):
        row[: len(kept)] = torch.tensor(kept, dtype=torch.int64) + head * head_size
    return places.flatten()


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """A copy of some rows of a matrix or vector, by position; zeros where that is -1."""
    taken = rows[places]
    taken[places < 0] = 0
    return taken


def _scale(tensor: Tensor, factor: float) -> Tensor:
    """tensor * factor, rounded once."""
    return (tensor.double() * factor).to(tensor.dtype)


def pack_layer(layer: DenseLayer, plan: LayerPlan, head_size: int, activation: str) -> LayerWeights:
    """Keep what is planned of the heads and FFN rows; fold the constants of the others into the output biases.

    The kernels divide scores by the root of the head size that they see. Where that is a smaller one than the model's,
    the queries make up for it.

    Args:
        layer: dense weights.
        plan: from `structure.plan_layer`, for the same weights.
        head_size: D, as stored.
        activation: of the FFN, one of `reference.ACTIVATIONS`.

    Returns: new, contiguous tensors with the dtype and device of the dense ones.
    """
    device = layer.value_weight.device
    query_key = places_of(plan, plan.query_key_dimensions, head_size).to(device)
    value = places_of(plan, plan.value_dimensions, head_size).to(device)
    gone = torch.ones_like(layer.value_bias, dtype=torch.bool)
    gone[value[value >= 0]] = False
    ffn = torch.zeros_like(layer.up_bias, dtype=torch.bool)
    ffn[list(plan.ffn_rows)] = True

    factor = math.sqrt(plan.head_size / head_size)
    qkv_weight, qkv_bias = (
        torch.cat([_scale(_take(q, query_key), factor), _take(k, query_key), _take(v, value)])
        for q, k, v in (
            (layer.query_weight, layer.key_weight, layer.value_weight),
            (layer.query_bias, layer.key_bias, layer.value_bias),
        )
    )
    attention_output_bias = _fold(
        layer.attention_output_bias, layer.attention_output_weight[:, gone], layer.value_bias[gone]
    )
    constants = ACTIVATIONS[activation](layer.up_bias[~ffn].double())
    down_bias = _fold(layer.down_bias, layer.down_weight[:, ~ffn], constants)
    return LayerWeights(
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        attention_output_weight=_take(layer.attention_output_weight.t(), value).t().contiguous(),
        attention_output_bias=attention_output_bias,
        attention_norm_weight=layer.attention_norm_weight.clone(),
        attention_norm_bias=layer.attention_norm_bias.clone(),
        up_weight=layer.up_weight[ffn],
        up_bias=layer.up_bias[ffn],
        down_weight=layer.down_weight[:, ffn].contiguous(),
        down_bias=down_bias,
        output_norm_weight=layer.output_norm_weight.clone(),
        output_norm_bias=layer.output_norm_bias.clone(),
    )
