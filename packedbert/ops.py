"""The ops, each once: schema, documentation, checks of shapes (the fake kernel), and the default in PyTorch.

`torch.ops.packedbert.*` has six ops. The native library adds kernels for the CPU to all of them but `encoder`, and for
CUDA to all but that and `embed`; every op has a default in plain PyTorch (reference.py) for any other device and for
machines without the library, so that the same call works everywhere. Four more are for eager calls on the CPU and have
native kernels only: `prepare_encoder` and `encoder_prepared` are `encoder_prepacked` in two steps (prepack.py), and
`prepare_bert` and `bert_prepared` are a whole model in two: `embed`, `encoder_prepared`, and perhaps an output layer
(shortcut.py).

A weight that a model stores is *canonical*, [out_features, in_features]. Kernels want it *prepacked*, in a
blocked layout that depends on the device (csrc/packed_layout.h). `encoder` takes canonical weights, or prepacked ones
on the CPU, and keeps what it prepacks in a `PrepackCache`; `packed_linear` and `encoder_prepacked` take what
`prepack_linear` returned on the same device.

Ops have no gradient: modules.py takes the differentiable `reference.encoder` where one is asked for.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch, reference
from .prepack import PrepackCache, PreparedEncoder
from .quantization import packed_size
from .reference import ACTIVATIONS, MATRICES, NORMS, LayerWeights

_SCHEMAS = torch.library.Library("packedbert", "DEF")

_SCHEMAS.define(
    "embed(Tensor input_ids, Tensor? token_type_ids, Tensor words, Tensor types, Tensor positions, str norm, "
    "Tensor norm_weight, Tensor norm_bias, float eps) -> Tensor"
)
_SCHEMAS.define("prepack_linear(Tensor weight) -> Tensor")
_SCHEMAS.define(
    "packed_linear(Tensor input, Tensor weight, Tensor bias, str activation, Tensor? residual, str norm, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor"
)
_SCHEMAS.define("pruned_attention(Tensor qkv, Tensor cu_seqlens, int num_heads, str precision) -> Tensor")
_SCHEMAS.define(
    "encoder_prepacked(Tensor hidden_states, Tensor? attention_mask, Tensor[] weights, int[] num_heads, "
    "str activation, str norm, float eps, str attention) -> Tensor"
)
_SCHEMAS.define(
    "prepare_encoder(Tensor[] weights, int[] num_heads, str activation, str norm, float eps, str attention) -> int"
)
_SCHEMAS.define("encoder_prepared(Tensor hidden_states, Tensor? attention_mask, int key) -> Tensor")
_SCHEMAS.define(
    "prepare_bert(Tensor words, Tensor types, Tensor positions, str norm, Tensor norm_weight, Tensor norm_bias, "
    "float eps, int encoder, Tensor? head_weight, Tensor? head_bias) -> int"
)
_SCHEMAS.define("bert_prepared(Tensor input_ids, Tensor? token_type_ids, Tensor? attention_mask, int key) -> Tensor[]")
_SCHEMAS.define(
    "encoder(Tensor hidden_states, Tensor? attention_mask, Tensor[] weights, int[] num_heads, "
    "str activation, str norm, float eps, str attention, str backend, int cache) -> Tensor"
)


def _check(condition: bool, op: str, argument: str, expected: object, got: object) -> None:
    if not condition:
        _fail(op, argument, expected, got)


def _fail(op: str, argument: str, expected: object, got: object) -> NoReturn:
    raise ValueError(f"packedbert::{op}: {argument}: expected {expected}, got {got}")


def _on_triton(tensor: Tensor) -> bool:
    """Whether an op without a kernel for the tensor's device runs on the Triton kernels."""
    return tensor.device.type == "cuda" and dispatch.resolve("auto", tensor.device, tensor.dtype) == "triton"


# --------------------------------------------------------------------------------------------------- embed


def _embed_check(input_ids: Tensor, token_type_ids: Tensor | None, words: Tensor, positions: Tensor, norm: str) -> None:
    op = "embed"
    _check(input_ids.dim() == 2, op, "input_ids", "[batch, length]", list(input_ids.shape))
    length, most = input_ids.shape[1], positions.shape[0]
    _check(length <= most, op, "input_ids", f"at most {most} positions", length)
    if token_type_ids is not None:
        shape = list(input_ids.shape)
        _check(list(token_type_ids.shape) == shape, op, "token_type_ids", shape, list(token_type_ids.shape))
    _check(words.dim() == 2, op, "words", "[vocab_size, hidden_size]", list(words.shape))
    _check(norm in NORMS, op, "norm", f"one of {', '.join(NORMS)}", repr(norm))


def _embed_default(
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
    _embed_check(input_ids, token_type_ids, words, positions, norm)
    return reference.embed(input_ids, token_type_ids, words, types, positions, norm, norm_weight, norm_bias, eps)


def _embed_fake(
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
    _embed_check(input_ids, token_type_ids, words, positions, norm)
    return words.new_empty((*input_ids.shape, words.shape[1]))


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
    """norm(word + token type + position): BertEmbeddings in one pass.

    Args:
        input_ids: int64 [batch, length].
        token_type_ids: int64 [batch, length], or None: all are 0.
        words: [vocab_size, hidden_size]; float32 on a CPU with the native library, like the tensors below.
        types: [type_vocab_size, hidden_size].
        positions: [max_position_embeddings, hidden_size], of which the first `length` are used.
        norm: as in `packed_linear`.
        norm_weight: [hidden_size].
        norm_bias: [hidden_size].
        eps: of LayerNorm.

    Returns: [batch, length, hidden_size], a new tensor.

    Raises:
        ValueError, RuntimeError, IndexError: shapes or dtypes that do not agree, an id without a row.
    """
    return torch.ops.packedbert.embed(
        input_ids, token_type_ids, words, types, positions, norm, norm_weight, norm_bias, eps
    )


# ------------------------------------------------------------------------------------------ prepack_linear

_HALVES = (torch.float16, torch.bfloat16)


def _prepacked_shape(out_features: int, in_features: int, device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    native = dispatch.NATIVE
    if native is not None and device.type == "cpu":
        return (-(-out_features // native.PANEL_WIDTH), in_features, native.PANEL_WIDTH)
    if native is not None and native.cuda_built() and device.type == "cuda" and dtype in _HALVES:
        outputs, inputs = native.TILE_OUTPUTS, native.TILE_INPUTS
        return (-(-out_features // outputs), -(-in_features // inputs), outputs, inputs)
    return (out_features, in_features)


def _prepack_linear_default(weight: Tensor) -> Tensor:
    _check(weight.dim() == 2, "prepack_linear", "weight", "[out_features, in_features]", list(weight.shape))
    return weight.contiguous().clone()


def _prepack_linear_fake(weight: Tensor) -> Tensor:
    _check(weight.dim() == 2, "prepack_linear", "weight", "[out_features, in_features]", list(weight.shape))
    return weight.new_empty(_prepacked_shape(weight.shape[0], weight.shape[1], weight.device, weight.dtype))


def prepack_linear(weight: Tensor) -> Tensor:
    """Copy a canonical weight into the layout that the kernels of its device read.

    Args:
        weight: [out_features, in_features]; float32 on a CPU with the native library.

    Returns: a new tensor on the same device. Native CPU: [ceil(out_features / P), in_features, P] panels, zero
    padded, P = `packedbert._C.PANEL_WIDTH`. CUDA kernels in half precision: tiles of 64 outputs and 32 inputs (see
    csrc/packed_layout.h). Elsewhere: a copy.

    Raises:
        ValueError, RuntimeError: wrong number of dimensions, dtype.
    """
    return torch.ops.packedbert.prepack_linear(weight)


# ------------------------------------------------------------------------------------------- packed_linear


def _packed_linear_check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    residual: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    op = "packed_linear"
    _check(input.dim() >= 1, op, "input", "[..., in_features]", list(input.shape))
    _check(bias.dim() == 1, op, "bias", "[out_features]", list(bias.shape))
    out_features = bias.shape[0]
    if weight.dtype == torch.int8:
        shape: tuple[int, ...] = (packed_size(out_features, input.shape[-1]),)
        maker = "pack_quantized"
    else:
        shape = _prepacked_shape(out_features, input.shape[-1], input.device, input.dtype)
        maker = "prepack_linear"
    _check(tuple(weight.shape) == shape, op, "weight", f"{list(shape)}, as {maker} returns it", list(weight.shape))
    _check(activation in ACTIVATIONS, op, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    _check(norm in NORMS, op, "norm", f"one of {', '.join(NORMS)}", repr(norm))
    output_shape = [*input.shape[:-1], out_features]
    if residual is not None:
        _check(list(residual.shape) == output_shape, op, "residual", output_shape, list(residual.shape))
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        expected = None if norm == "none" else [out_features]
        got = None if tensor is None else list(tensor.shape)
        _check(got == expected, op, name, f"{expected} with norm {norm!r}", got)


def _packed_linear_default(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    residual: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    _packed_linear_check(input, weight, bias, activation, residual, norm, norm_weight, norm_bias)
    if _on_triton(input) and weight.dtype == input.dtype:
        from . import triton_kernels

        return triton_kernels.packed_linear(
            input, weight, bias, activation, residual, norm, norm_weight, norm_bias, eps
        )
    return reference.packed_linear(input, weight, bias, activation, residual, norm, norm_weight, norm_bias, eps)


def _packed_linear_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    residual: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    _packed_linear_check(input, weight, bias, activation, residual, norm, norm_weight, norm_bias)
    return input.new_empty((*input.shape[:-1], bias.shape[0]))


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
    """norm(act(input W^T + bias) + residual), the product never leaving the cache before the epilogue is done.

    Args:
        input: [..., in_features].
        weight: W as `prepack_linear` returned it on this device; or int8, as `quantization.pack_quantized` returned
            it: then each row of the input is quantized to 8 bits, and a row with a NaN or an infinity gives NaN.
        bias: [out_features].
        activation: "none", "relu", "gelu" (x * Phi(x); the native kernel gives the limit 0 at -inf, where the
            formula gives NaN) or "gelu_new" (its tanh approximation).
        residual: None or [..., out_features].
        norm: "none", "layer_norm" (biased variance over out_features) or "no_norm" (y * norm_weight + norm_bias).
        norm_weight: [out_features] if there is a norm.
        norm_bias: [out_features] if there is a norm.
        eps: added to the variance.

    Returns: [..., out_features], a new tensor.

    Raises:
        ValueError, RuntimeError: shapes that do not agree, an unknown activation or norm, another dtype.
    """
    return torch.ops.packedbert.packed_linear(
        input, weight, bias, activation, residual, norm, norm_weight, norm_bias, eps
    )


# ---------------------------------------------------------------------------------------- pruned_attention


def _pruned_attention_check(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, precision: str) -> None:
    op = "pruned_attention"
    _check(precision in reference.ATTENTIONS, op, "precision", f"one of {', '.join(reference.ATTENTIONS)}", precision)
    _check(num_heads >= 0, op, "num_heads", "0 or more", num_heads)
    _check(
        qkv.dim() == 2 and (qkv.shape[1] % (3 * num_heads) == 0 if num_heads else qkv.shape[1] == 0),
        op,
        "qkv",
        f"[tokens, 3 * {num_heads} heads * head_size]",
        list(qkv.shape),
    )
    _check(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1, op, "cu_seqlens", "[batch + 1]", list(cu_seqlens.shape))
    _check(cu_seqlens.dtype == torch.int32, op, "cu_seqlens", "torch.int32", cu_seqlens.dtype)


def _pruned_attention_default(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, precision: str) -> Tensor:
    _pruned_attention_check(qkv, cu_seqlens, num_heads, precision)
    if precision == "fp32" and _on_triton(qkv) and qkv.shape[1] <= 3 * max(num_heads, 1) * _MAX_GPU_HEAD_SIZE:
        from . import triton_kernels

        return triton_kernels.pruned_attention(qkv, cu_seqlens, num_heads)
    bounds = cu_seqlens.tolist()
    sound = bounds[0] == 0 and bounds[-1] == qkv.shape[0] and bounds == sorted(bounds)
    _check(sound, "pruned_attention", "cu_seqlens", f"ascending from 0 to {qkv.shape[0]}, the tokens of qkv", bounds)
    return reference.pruned_attention(qkv, cu_seqlens, num_heads, precision).contiguous()


def _pruned_attention_fake(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, precision: str) -> Tensor:
    _pruned_attention_check(qkv, cu_seqlens, num_heads, precision)
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))


def pruned_attention(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, precision: str = "fp32") -> Tensor:
    """softmax(q k^T / sqrt(head_size)) v over the heads that are left, within each sequence of a ragged batch.

    Args:
        qkv: [tokens, 3 * num_heads * head_size]: no padded token is in it. float32 on a CPU with the native library.
        cu_seqlens: int32 [batch + 1], ascending from 0 to tokens; a sequence may be empty.
        num_heads: heads left; may be 0.
        precision: of the two products: "fp32", or "int8" as `quantization.quantized_attention` does it (on a CPU with
            the native library, heads of at most 512 dimensions).

    Returns: [tokens, num_heads * head_size], a new tensor.

    Raises:
        ValueError, RuntimeError: a shape, dtype or cu_seqlens that does not fit.
    """
    return torch.ops.packedbert.pruned_attention(qkv, cu_seqlens, num_heads, precision)


# --------------------------------------------------------------------------------------- encoder_prepacked


def _encoder_check(
    op: str,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    attention: str,
) -> None:
    # Every call comes here: texts are made where they are needed only.
    shape = hidden_states.shape
    if len(shape) != 3:
        _fail(op, "hidden_states", "[batch, length, hidden_size]", list(shape))
    if attention_mask is not None and attention_mask.shape != shape[:2]:
        _fail(op, "attention_mask", f"{list(shape[:2])} or None", list(attention_mask.shape))
    if attention not in reference.ATTENTIONS:
        _fail(op, "attention", f"one of {', '.join(reference.ATTENTIONS)}", attention)
    if len(weights) != (expected := len(num_heads) * len(LayerWeights._fields)):
        _fail(op, "weights", f"{expected} tensors for {len(num_heads)} layers", len(weights))


def run_layers(
    hidden_states: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str,
    norm: str,
    eps: float,
    attention: str,
    linear: Callable[..., Tensor],
) -> Tensor:
    """The encoder layer by layer on the real tokens; `mask` is bool, `weights` in the layout that `linear` takes."""
    batch, length, hidden_size = hidden_states.shape
    if mask is None:
        mask = torch.ones_like(hidden_states[:, :, 0], dtype=torch.bool)
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    real = mask.flatten().nonzero().flatten()  # positions of the real tokens in the padded batch
    dense = real.shape[0] == batch * length
    tokens = hidden_states.reshape(batch * length, hidden_size)
    x = tokens.clone() if dense else tokens[real]

    for heads, w in zip(num_heads, reference.split_layers(weights), strict=True):
        # A layer whose projections are not quantized was found to need float.
        quantized = attention == "int8" and w.qkv_weight.dtype == torch.int8

        def attend(qkv: Tensor, heads: int = heads, precision: str = "int8" if quantized else "fp32") -> Tensor:
            return reference.pruned_attention(qkv, cu_seqlens, heads, precision)

        x = reference.layer(x, w, attend, activation, norm, eps, linear)

    if not dense:
        x = tokens.new_zeros(tokens.shape).index_copy_(0, real, x)
    return x.view(hidden_states.shape)


def _encoder_prepacked_default(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str,
    norm: str,
    eps: float,
    attention: str,
) -> Tensor:
    _encoder_check("encoder_prepacked", hidden_states, attention_mask, weights, num_heads, attention)
    return run_layers(
        hidden_states, attention_mask, weights, num_heads, activation, norm, eps, attention, packed_linear
    )


def _encoder_prepacked_fake(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str,
    norm: str,
    eps: float,
    attention: str,
) -> Tensor:
    _encoder_check("encoder_prepacked", hidden_states, attention_mask, weights, num_heads, attention)
    return hidden_states.new_empty(hidden_states.shape)


def encoder_prepacked(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str,
    norm: str,
    eps: float,
    attention: str = "fp32",
) -> Tensor:
    """`encoder` with weights that are prepacked already; one native call on the CPU.

    Args:
        hidden_states: [batch, length, hidden_size], the embeddings; float32 on a CPU with the native library.
        attention_mask: None (all tokens are real) or bool [batch, length], in any pattern.
        weights: the `reference.LayerWeights` of all layers, one after the other, with each of the four matrices as
            `packed_linear` takes it on this device.
        num_heads: heads left in each layer.
        activation: of the FFN, as in `packed_linear`.
        norm: after each residual, as in `packed_linear`.
        eps: of LayerNorm.
        attention: "fp32", or "int8": its products are quantized in layers whose qkv weight is, as `pruned_attention`
            does it.

    Returns: [batch, length, hidden_size], a new tensor; 0 at padded positions.

    Raises:
        ValueError, RuntimeError: shapes or dtypes that do not agree, an unknown activation or norm.
    """
    return torch.ops.packedbert.encoder_prepacked(
        hidden_states, attention_mask, weights, num_heads, activation, norm, eps, attention
    )


# ------------------------------------------------------------------------------------------------- encoder

#: For each field of LayerWeights, whether kernels want it prepacked.
_IS_MATRIX = [name.removesuffix("_weight") in MATRICES for name in LayerWeights._fields]


def _encoder_default(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str,
    norm: str,
    eps: float,
    attention: str,
    backend: str,
    cache: int,
) -> Tensor:
    _encoder_check("encoder", hidden_states, attention_mask, weights, num_heads, attention)
    wish, backend = backend, dispatch.resolve(backend, hidden_states.device, hidden_states.dtype)
    mask = None if attention_mask is None else attention_mask != 0

    def on_reference() -> Tensor:
        return run_layers(
            hidden_states, mask, weights, num_heads, activation, norm, eps, attention, reference.packed_linear
        )

    if backend == "reference":
        return on_reference()
    if backend != "cpu" and (reason := _why_not_on_gpu(weights, num_heads)):
        if dispatch.requested(wish) == backend:
            raise RuntimeError(f"backend {backend!r} was asked for, but {reason}; backend='auto' takes what works")
        return on_reference()
    # What the kernels compute in.
    dtype = torch.float32 if backend == "cpu" else hidden_states.dtype
    if backend == "triton":
        from . import triton_kernels  # not at the top: triton need not be there, and takes a second to import

        canonical = [weight.to(dtype).contiguous() for weight in weights]
        return triton_kernels.encoder(hidden_states, mask, canonical, num_heads, activation, norm, eps)
    prepack_cache = PrepackCache.find(cache)
    settings = (tuple(num_heads), activation, norm, eps, attention)
    states = hidden_states.to(dtype)
    kept = backend == "cpu" and cache != 0
    if kept and weights:
        prepared = prepare_encoder(weights, settings, prepack_cache)
        output = torch.ops.packedbert.encoder_prepared(states, mask, prepared.key)
    else:
        output = encoder_prepacked(states, mask, _prepack(weights, dtype, prepack_cache, kept), *settings)
    return output.to(hidden_states.dtype)


def _prepack(weights: Sequence[Tensor], dtype: torch.dtype, cache: PrepackCache, kept: bool) -> list[Tensor]:
    """The weights of all layers as `encoder_prepacked` takes them; with `kept` the cache outlives the call."""
    matrices = {
        slot: weight
        for slot, (weight, is_matrix) in enumerate(zip(weights, itertools.cycle(_IS_MATRIX), strict=False))
        if is_matrix and weight.dim() == 2 and weight.dtype != torch.int8  # else it is prepacked already
    }
    if kept:  # memory mapped for one call would cost more than it gains
        shapes = {slot: _prepacked_shape(w.shape[0], w.shape[1], w.device, dtype) for slot, w in matrices.items()}
        cache.reserve(shapes, dtype)
    return [
        cache.get(slot, weight, lambda matrix: prepack_linear(matrix.to(dtype)))
        if slot in matrices
        else weight.to(torch.int8 if weight.dtype == torch.int8 else dtype).contiguous()
        for slot, weight in enumerate(weights)
    ]


def prepare_encoder(weights: Sequence[Tensor], settings: tuple[Any, ...], cache: PrepackCache) -> PreparedEncoder:
    """An encoder for the native CPU kernels, from the cache if nothing changed.

    Args:
        weights: as `encoder` takes them, on the CPU.
        settings: num_heads, activation, norm, eps and attention, as `encoder` takes them; num_heads as a tuple.
        cache: to use.

    Raises:
        ValueError, RuntimeError: shapes or dtypes that do not agree, an unknown activation or norm.
    """
    return cache.encoder(weights, settings, lambda: _prepack(weights, torch.float32, cache, kept=True))


#: The largest head that the CUDA and Triton kernels take (csrc/cuda/pruned_attention.h; triton_kernels.py).
_MAX_GPU_HEAD_SIZE = 128


def _why_not_on_gpu(weights: Sequence[Tensor], num_heads: Sequence[int]) -> str:
    """Empty if the CUDA and Triton kernels can run an encoder with these weights, else the reason."""
    if any(weight.dtype == torch.int8 for weight in weights):
        return "int8 weights run on the cpu and reference backends only"
    sizes = [
        layer.qkv_bias.shape[0] // (3 * heads)
        for heads, layer in zip(num_heads, reference.split_layers(weights), strict=True)
        if heads
    ]
    if max(sizes, default=0) > _MAX_GPU_HEAD_SIZE:
        return f"its heads have {max(sizes)} dimensions, at most {_MAX_GPU_HEAD_SIZE} are supported"
    return ""


def _encoder_fake(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str,
    norm: str,
    eps: float,
    attention: str,
    backend: str,
    cache: int,
) -> Tensor:
    _encoder_check("encoder", hidden_states, attention_mask, weights, num_heads, attention)
    return hidden_states.new_empty(hidden_states.shape)


def is_recorded() -> bool:
    """Whether somebody records the calls, who has to see ops with weights and not a number in their place."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def encoder(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str = "gelu",
    norm: str = "layer_norm",
    eps: float = 1e-12,
    attention: str = "fp32",
    backend: str = "auto",
    cache: int = 0,
) -> Tensor:
    """All layers of a packed BERT encoder on the real tokens of a padded batch.

    The tokens that the mask keeps are gathered once, run through all layers as one ragged batch, and scattered
    back once; no layer computes a padded token.

    Args:
        hidden_states: [batch, length, hidden_size], the embeddings.
        attention_mask: None (all tokens are real) or [batch, length], non-zero for real tokens, in any pattern
            (holes, left padding, rows without any).
        weights: the canonical `reference.LayerWeights` of all layers, one after the other; a matrix may be in half
            precision, int8 as `quantization.pack_quantized` returned it, or as `prepack_linear` did for the CPU.
        num_heads: heads left in each layer.
        activation: of the FFN, as in `packed_linear`.
        norm: after each residual, as in `packed_linear`.
        eps: of LayerNorm.
        attention: as in `encoder_prepacked`.
        backend: as in `PackedBertConfig`.
        cache: key of the `PrepackCache` to use; 0 packs for this call only.

    Returns: [batch, length, hidden_size], a new tensor; 0 at padded positions. There is no gradient.

    Raises:
        ValueError: shapes that do not agree.
        RuntimeError: a backend that was asked for by name and cannot run here.
    """
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *weights))
    if type(hidden_states) is Tensor and not gradient and not is_recorded():
        # The op's own default, without handing all the weights to the dispatcher and back.
        return _encoder_default(
            hidden_states, attention_mask, weights, num_heads, activation, norm, eps, attention, backend, cache
        )
    return torch.ops.packedbert.encoder(
        hidden_states, attention_mask, weights, num_heads, activation, norm, eps, attention, backend, cache
    )


# -------------------------------------------------------------------------------------------- registration


def _no_gradient(op: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"packedbert::{op} has no gradient: call the function of that name in packedbert.reference")

    return backward


for _name, _default, _fake in (
    ("embed", _embed_default, _embed_fake),
    ("prepack_linear", _prepack_linear_default, _prepack_linear_fake),
    ("packed_linear", _packed_linear_default, _packed_linear_fake),
    ("pruned_attention", _pruned_attention_default, _pruned_attention_fake),
    ("encoder_prepacked", _encoder_prepacked_default, _encoder_prepacked_fake),
    ("encoder", _encoder_default, _encoder_fake),
):
    _SCHEMAS.impl(_name, _default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"packedbert::{_name}", _fake, lib=_SCHEMAS)
    torch.library.register_autograd(f"packedbert::{_name}", _no_gradient(_name), lib=_SCHEMAS)
