"""What is left of a pruned encoder. Pure functions: dense weights in, a `LayerPlan` out; nothing is changed.

A layer's FFN row or attention head may go when the model's function stays the same without it (packing.py
folds what a removed part still contributes, a constant, into the next bias):

- an FFN row whose weights are all zero gives the constant act(bias); one whose output column is all zero gives
  nothing;
- a head whose value rows are all zero gives the constant b_v, since attention probabilities sum to 1; one whose
  output columns are all zero gives nothing.

Both rules hold in inference only: dropout would scale what is folded.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class DenseLayer(NamedTuple):
    """The weights of a stock BERT layer: `stored` heads of D dimensions and I FFN rows, pruned or not."""

    query_weight: Tensor  # [stored*D, hidden]
    query_bias: Tensor  # [stored*D]
    key_weight: Tensor  # [stored*D, hidden]
    key_bias: Tensor  # [stored*D]
    value_weight: Tensor  # [stored*D, hidden]
    value_bias: Tensor  # [stored*D]
    attention_output_weight: Tensor  # [hidden, stored*D]
    attention_output_bias: Tensor  # [hidden]
    attention_norm_weight: Tensor  # [hidden]
    attention_norm_bias: Tensor  # [hidden]
    up_weight: Tensor  # [I, hidden]
    up_bias: Tensor  # [I]
    down_weight: Tensor  # [hidden, I]
    down_bias: Tensor  # [hidden]
    output_norm_weight: Tensor  # [hidden]
    output_norm_bias: Tensor  # [hidden]


class LayerPlan(NamedTuple):
    """What to keep of a layer: positions among the heads and FFN rows that it stores, ascending."""

    heads: tuple[int, ...]
    ffn_rows: tuple[int, ...]


class LayerStructure(NamedTuple):
    """What is left of a layer. Heads are numbered as in the model before any pruning."""

    heads: tuple[int, ...]
    ffn_width: int


@dataclass(frozen=True)
class EncoderStructure:
    """Everything about an encoder but its weights.

    Attributes:
        hidden_size: width of the residual stream.
        num_heads: heads of every layer before pruning.
        head_size: dimensions of a head.
        intermediate_size: FFN rows of every layer before pruning.
        activation: of the FFN, one of `reference.ACTIVATIONS`.
        norm: "layer_norm" or "no_norm".
        eps: of LayerNorm.
        layers: what is left of each.
    """

    hidden_size: int
    num_heads: int
    head_size: int
    intermediate_size: int
    activation: str
    norm: str
    eps: float
    layers: tuple[LayerStructure, ...]

    def layer_parameters(self, heads: int, ffn_width: int) -> int:
        """Parameters of a layer with that many heads and FFN rows."""
        inner = heads * self.head_size
        attention = 3 * inner * (self.hidden_size + 1) + self.hidden_size * (inner + 1)
        ffn = ffn_width * (self.hidden_size + 1) + self.hidden_size * (ffn_width + 1)
        return attention + ffn + 4 * self.hidden_size


def plan_layer(layer: DenseLayer, head_size: int) -> LayerPlan:
    """Find the heads and FFN rows that have to be kept.

    Args:
        layer: dense weights, on any device.
        head_size: D; divides the rows of query, key and value.

    Raises:
        ValueError: a weight is NaN or infinite (a zero times it would not be zero).
    """
    for name, tensor in layer._asdict().items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{name}: expected finite weights, got {bad} NaN or infinite of {tensor.numel()}; "
                "the checkpoint is damaged or the training diverged"
            )
    stored = layer.value_weight.shape[0] // head_size
    value_rows = layer.value_weight.reshape(stored, head_size * layer.value_weight.shape[1])
    output_columns = layer.attention_output_weight.t().reshape(value_rows.shape)
    heads = (value_rows != 0).any(1) & (output_columns != 0).any(1)
    ffn_rows = (layer.up_weight != 0).any(1) & (layer.down_weight != 0).any(0)
    return LayerPlan(tuple(heads.nonzero().flatten().tolist()), tuple(ffn_rows.nonzero().flatten().tolist()))
