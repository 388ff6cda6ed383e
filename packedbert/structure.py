"""What is left of a pruned encoder. Pure functions: dense weights in, a `LayerPlan` out; nothing is changed.

A layer's FFN row or attention head may go when the model's function stays the same without it (packing.py
folds what a removed part still contributes, a constant, into the next bias):

- an FFN row whose weights are all zero gives the constant act(bias); one whose output column is all zero gives
  nothing;
- a dimension of a head's values whose row is zero gives the constant b_v, since attention probabilities sum to 1; one
  whose output column is zero gives nothing. A head that has no other dimension of values may go as a whole;
- a dimension of a head's queries and keys whose key row is zero adds the same to every key's score, whatever the key's
  bias, and softmax cancels it; one whose query row *and* query bias are zero adds nothing. (A query bias alone adds
  b_q k, which differs from key to key.)

The kernels know one head size for the queries, keys and values of all heads of a layer. So dimensions go only as far
as the widest head that is left allows; heads that need fewer are padded with zeros.

What is folded holds in inference only: dropout would scale it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Heads that have lost dimensions are padded to a multiple of this: in half precision the 16 bytes that a GPU copies at
#: a time. The CPU kernels take any size as well.
HEAD_SIZE_STEP = 8


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
    """What to keep of a layer: positions among the heads and FFN rows that it stores, ascending.

    Of each of these heads some dimensions are kept, numbered within the head, ascending, and at most `head_size` of
    either kind.
    """

    heads: tuple[int, ...]
    ffn_rows: tuple[int, ...]
    head_size: int
    query_key_dimensions: tuple[tuple[int, ...], ...]
    value_dimensions: tuple[tuple[int, ...], ...]


class LayerStructure(NamedTuple):
    """What is left of a layer. Heads are numbered as in the model before any pruning."""

    heads: tuple[int, ...]
    ffn_width: int
    #: Dimensions of each of these heads; None: as many as before any pruning.
    head_size: int | None = None


@dataclass(frozen=True)
class EncoderStructure:
    """Everything about an encoder but its weights.

    Attributes:
        hidden_size: width of the residual stream.
        num_heads: heads of every layer before pruning.
        head_size: dimensions of a head before pruning.
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

    def head_size_of(self, layer: LayerStructure) -> int:
        """Dimensions of each head that is left of one of the layers."""
        return self.head_size if layer.head_size is None else layer.head_size

    def layer_parameters(self, heads: int, ffn_width: int, head_size: int | None = None) -> int:
        """Parameters of a layer with that many heads and FFN rows; head_size None: as before pruning."""
        inner = heads * (self.head_size if head_size is None else head_size)
        attention = 3 * inner * (self.hidden_size + 1) + self.hidden_size * (inner + 1)
        ffn = ffn_width * (self.hidden_size + 1) + self.hidden_size * (ffn_width + 1)
        return attention + ffn + 4 * self.hidden_size


def plan_layer(layer: DenseLayer, head_size: int) -> LayerPlan:
    """Find the heads, their dimensions, and the FFN rows that have to be kept.

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
    query = (layer.query_weight != 0).any(1) | (layer.query_bias != 0)
    key = (layer.key_weight != 0).any(1)
    value = (layer.value_weight != 0).any(1) & (layer.attention_output_weight != 0).any(0)
    heads = value.view(-1, head_size).any(1)
    query_key_dimensions, value_dimensions = (
        tuple(_positions(dimensions) for dimensions in needed.view(-1, head_size)[heads])
        for needed in (query & key, value)
    )
    widest = max(map(len, query_key_dimensions + value_dimensions), default=head_size)
    size = -(-widest // HEAD_SIZE_STEP) * HEAD_SIZE_STEP
    if size >= head_size:  # nothing would be saved: leave the layer's attention as it is
        size = head_size
        query_key_dimensions = value_dimensions = (tuple(range(head_size)),) * len(value_dimensions)
    ffn_rows = (layer.up_weight != 0).any(1) & (layer.down_weight != 0).any(0)
    return LayerPlan(_positions(heads), _positions(ffn_rows), size, query_key_dimensions, value_dimensions)


def _positions(mask: Tensor) -> tuple[int, ...]:
    """Where a vector of booleans is true."""
    return tuple(mask.nonzero().flatten().tolist())
