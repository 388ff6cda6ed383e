"""Every op in plain PyTorch: the oracle of the kernels, the differentiable path, the fallback anywhere.

These functions say what the ops *mean*. They run in any floating dtype (tests run them in float64 and
compare the kernels with that), on any device, under autograd and under `torch.compile`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantization import quantized_attention, quantized_product, unpack_quantized


def _gelu_new(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel's tanh approximation of GELU (arXiv 1606.08415), as in the original BERT code."""
    return F.gelu(x, approximate="tanh")


#: Activation names that every kernel knows; `gelu` is the exact one, x * Phi(x).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
}

#: Norms that can follow a residual; `no_norm` is nn_pruning's NoNorm (MobileBERT, arXiv 2004.02984).
NORMS = ("none", "layer_norm", "no_norm")

#: What attention's two products may be computed in.
ATTENTIONS = ("fp32", "int8")


class LayerWeights(NamedTuple):
    """The packed weights of one encoder layer, in the order in which the `encoder` op takes them.

    `H` heads of `D` dimensions and `F` FFN rows are left of the layer; both may be 0.
    """

    qkv_weight: Tensor  # [3*H*D, hidden]: the rows of q, then of k, then of v; each head by head
    qkv_bias: Tensor  # [3*H*D]
    attention_output_weight: Tensor  # [hidden, H*D]
    attention_output_bias: Tensor  # [hidden]
    attention_norm_weight: Tensor  # [hidden]
    attention_norm_bias: Tensor  # [hidden]
    up_weight: Tensor  # [F, hidden]
    up_bias: Tensor  # [F]
    down_weight: Tensor  # [hidden, F]
    down_bias: Tensor  # [hidden]
    output_norm_weight: Tensor  # [hidden]
    output_norm_bias: Tensor  # [hidden]


#: The matrices of a layer: fields `<name>_weight` of LayerWeights. The other fields are vectors.
MATRICES = ("qkv", "attention_output", "up", "down")


def normalize(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Apply one of `NORMS` over the last dimension of x."""
    if norm == "layer_norm":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    if norm == "no_norm":
        assert weight is not None
        assert bias is not None
        return x * weight + bias
    return x


def embed(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    words: Tensor,
    types: Tensor,
    positions: Tensor,
    norm: str,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """norm(word + token type + position): [B, S] ids -> [B, S, hidden_size], with tables [rows, hidden_size]."""
    of_types = types[0] if token_type_ids is None else F.embedding(token_type_ids, types)
    x = F.embedding(input_ids, words) + of_types + positions[: input_ids.shape[1]]
    return normalize(x, norm, norm_weight, norm_bias, eps)


def packed_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """norm(act(input @ weight.T + bias) + residual), with `weight` [N, K] as the model stores it, or packed int8."""
    if weight.dtype == torch.int8:
        quantized = unpack_quantized(weight, bias.shape[0], input.shape[-1])
        output = ACTIVATIONS[activation](quantized_product(input, quantized) + bias)
    else:
        output = ACTIVATIONS[activation](F.linear(input, weight.to(input.dtype), bias))
    if residual is not None:
        output = output + residual
    return normalize(output, norm, norm_weight, norm_bias, eps)


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, 3*H*D] -> q, k and v, each [B, H, S, D]."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _merge_heads(context: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H*D]."""
    return context.transpose(1, 2).flatten(2)


def pruned_attention(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, precision: str = "fp32") -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sequence of a ragged batch.

    Args:
        qkv: [T, 3*H*D], the tokens of all sequences one after the other.
        cu_seqlens: int32 [B+1]; sequence b owns tokens cu_seqlens[b] to cu_seqlens[b+1] (it may be empty).
        num_heads: H, the heads that are left; may be 0.
        precision: of the products, one of `ATTENTIONS`.

    Returns: [T, H*D].
    """
    attend = quantized_attention if precision == "int8" else F.scaled_dot_product_attention
    if num_heads == 0 or qkv.shape[0] == 0:
        return qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if len(set(lengths)) == 1:  # a rectangle: one call instead of one per sequence
        rectangle = qkv.view(len(lengths), lengths[0], -1)
        context = attend(*_split_heads(rectangle, num_heads))
        return _merge_heads(context).flatten(0, 1)
    contexts = [_merge_heads(attend(*_split_heads(sequence[None], num_heads)))[0] for sequence in qkv.split(lengths)]
    return torch.cat(contexts)


def attention_bias(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to the attention scores: 0 where a query may look at a key, -inf where it may not.

    Args:
        attention_mask: None; [B, S] with non-zero for real tokens; or, per query, [B, S, S] or [B, 1, S, S],
            either boolean or integer (non-zero: may look) or floating point (added to the scores as it is).
        dtype: of the scores.

    Returns: None, or a tensor that broadcasts over [B, H, S, S]. A row that may look at nothing looks at
    everything instead, so that it stays finite: the encoder zeroes such tokens afterwards.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() > 2 and attention_mask.is_floating_point():
        return (attention_mask if attention_mask.dim() == 4 else attention_mask[:, None]).to(dtype)
    visible = attention_mask != 0
    if visible.dim() == 2:
        visible = visible[:, None, None, :]
    elif visible.dim() == 3:
        visible = visible[:, None]
    visible = visible | ~visible.any(-1, keepdim=True)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -math.inf)


def layer(
    x: Tensor,
    w: LayerWeights,
    attend: Callable[[Tensor], Tensor],
    activation: str,
    norm: str,
    eps: float,
    linear: Callable[..., Tensor] = packed_linear,
) -> Tensor:
    """One encoder layer (post-norm, as in BERT).

    Args:
        x: [..., hidden].
        w: its weights, in the layout that `linear` takes.
        attend: from qkv [..., 3*H*D] to the context [..., H*D].
        activation: of the FFN, one of `ACTIVATIONS`.
        norm: after each residual, one of `NORMS`.
        eps: of LayerNorm.
        linear: `packed_linear` of this module or of ops.py.

    Returns: [..., hidden].
    """
    context = attend(linear(x, w.qkv_weight, w.qkv_bias))
    attended = linear(
        context,
        w.attention_output_weight,
        w.attention_output_bias,
        residual=x,
        norm=norm,
        norm_weight=w.attention_norm_weight,
        norm_bias=w.attention_norm_bias,
        eps=eps,
    )
    return linear(
        linear(attended, w.up_weight, w.up_bias, activation),
        w.down_weight,
        w.down_bias,
        residual=attended,
        norm=norm,
        norm_weight=w.output_norm_weight,
        norm_bias=w.output_norm_bias,
        eps=eps,
    )


def split_layers(weights: Sequence[Tensor]) -> list[LayerWeights]:
    """The flat list of all layers' weights, as the `encoder` op takes it, layer by layer."""
    fields = len(LayerWeights._fields)
    return [LayerWeights(*weights[first : first + fields]) for first in range(0, len(weights), fields)]


def encoder(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str,
    norm: str,
    eps: float,
    *,
    all_hidden_states: list[Tensor] | None = None,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """All layers on the padded batch: the oracle of the `encoder` op, and the path that keeps gradients.

    Args:
        hidden_states: [B, S, hidden], the embeddings.
        attention_mask: as `attention_bias` takes it.
        weights: the `LayerWeights` of all layers, one after the other.
        num_heads: heads left in each layer.
        activation: of the FFN, one of `ACTIVATIONS`.
        norm: after each residual, one of `NORMS`.
        eps: of LayerNorm.
        all_hidden_states: if given, the output of every layer is appended, [B, S, hidden].
        attentions: if given, every layer's probabilities are appended, [B, heads left, S, S].

    Returns: [B, S, hidden]. Where a 2-D mask is 0, the result is 0, and what stood there (a NaN, say) has no
    influence on the real tokens.
    """
    x = hidden_states
    padding = None
    if attention_mask is not None and attention_mask.dim() == 2:
        padding = (attention_mask == 0)[:, :, None]
        x = x.masked_fill(padding, 0)
    bias = attention_bias(attention_mask, x.dtype)

    for heads, w in zip(num_heads, split_layers(weights), strict=True):

        def attend(qkv: Tensor, heads: int = heads) -> Tensor:
            return _padded_attention(qkv, heads, bias, attentions)

        x = layer(x, w, attend, activation, norm, eps)
        if padding is not None:
            x = x.masked_fill(padding, 0)
        if all_hidden_states is not None:
            all_hidden_states.append(x)
    return x


def _padded_attention(qkv: Tensor, heads: int, bias: Tensor | None, attentions: list[Tensor] | None) -> Tensor:
    """Context [B, S, heads*D] of qkv [B, S, 3*heads*D]; the probabilities are appended to `attentions`, if given."""
    if heads == 0:
        if attentions is not None:
            batch, length, _ = qkv.shape
            attentions.append(qkv.new_empty((batch, 0, length, length)))
        return qkv
    q, k, v = _split_heads(qkv, heads)
    if attentions is None:
        return _merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    attentions.append(torch.softmax(scores if bias is None else scores + bias, dim=-1))
    return _merge_heads(attentions[-1] @ v)
