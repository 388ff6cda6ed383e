"""Dense weights + plan -> packed weights. Pure: the dense tensors are read, never written or aliased."""

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


def pack_layer(layer: DenseLayer, plan: LayerPlan, head_size: int, activation: str) -> LayerWeights:
    """Keep the planned heads and FFN rows; fold the constants of the others into the output biases.

    Args:
        layer: dense weights.
        plan: from `structure.plan_layer`, for the same weights.
        head_size: D.
        activation: of the FFN, one of `reference.ACTIVATIONS`.

    Returns: new, contiguous tensors with the dtype and device of the dense ones.
    """
    device = layer.value_weight.device
    stored, rows = layer.value_weight.shape[0] // head_size, layer.up_weight.shape[0]
    kept_heads = torch.zeros(stored, dtype=torch.bool)
    kept_heads[list(plan.heads)] = True
    inner = kept_heads.repeat_interleave(head_size).to(device)
    kept_rows = torch.zeros(rows, dtype=torch.bool)
    kept_rows[list(plan.ffn_rows)] = True
    ffn = kept_rows.to(device)

    attention_output_bias = _fold(
        layer.attention_output_bias, layer.attention_output_weight[:, ~inner], layer.value_bias[~inner]
    )
    constants = ACTIVATIONS[activation](layer.up_bias[~ffn].double())
    down_bias = _fold(layer.down_bias, layer.down_weight[:, ~ffn], constants)
    return LayerWeights(
        qkv_weight=torch.cat([w[inner] for w in (layer.query_weight, layer.key_weight, layer.value_weight)]),
        qkv_bias=torch.cat([b[inner] for b in (layer.query_bias, layer.key_bias, layer.value_bias)]),
        attention_output_weight=layer.attention_output_weight[:, inner].contiguous(),
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
