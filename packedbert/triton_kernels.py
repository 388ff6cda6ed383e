"""The GPU ops in Triton: for GPUs without our compiled kernels (no toolkit at install time, AMD, newer chips).

The kernels are those of csrc/cuda in their order, on canonical weights: `packed_linear`, a norm of whole rows after it,
`pruned_attention`, and all layers in `encoder`. A block of threads that has no real token returns at once, so the host
never needs to know how many there are.

Importing this needs triton. With TRITON_INTERPRET=1 set before, the kernels run on the CPU, slowly: for tests.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

#: The largest head that `pruned_attention` takes.
MAX_HEAD_SIZE = 128

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # in this order a NaN stays a NaN
    if ACTIVATION == "gelu":
        x = tl.where(x < -14.0, -14.0, x)  # below, the result is 0; without the bound -infinity would give NaN
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_new":
        x = tl.where(x < -100.0, -100.0, x)
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1.0 - 1.0 / (1.0 + tl.math.exp(2.0 * u)))  # 0.5 (1 + tanh u), which Triton's interpreter lacks
    return x


@triton.jit(do_not_specialize=["rows"])  # or a length that is a multiple of 16 would be compiled again
def _linear_kernel(
    x_ptr, w_ptr, b_ptr, r_ptr, y_ptr, rows_used_ptr, rows, N, K, x_pitch, r_pitch, y_pitch,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, BOUNDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of activation(x [rows, K] w [N, K]^T + b) + r."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    used = rows
    if BOUNDED:
        used = tl.load(rows_used_ptr)
    if tl.program_id(0) * BM < used:
        sums = tl.zeros((BM, BN), dtype=tl.float32)
        x_row = x_ptr + row.to(tl.int64)[:, None] * x_pitch
        w_row = w_ptr + column.to(tl.int64)[None, :] * K
        for first in range(0, K, BK):
            k = first + tl.arange(0, BK)
            x = tl.load(x_row + k[None, :], mask=(row[:, None] < used) & (k[None, :] < K), other=0.0)
            w = tl.load(w_row + k[:, None], mask=(column[None, :] < N) & (k[:, None] < K), other=0.0)
            sums = tl.dot(x, w, sums, input_precision="ieee")
        sums += tl.load(b_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        sums = _activate(sums, ACTIVATION)
        there = (row[:, None] < used) & (column[None, :] < N)
        if RESIDUAL:
            residual = r_ptr + row.to(tl.int64)[:, None] * r_pitch + column[None, :]
            sums += tl.load(residual, mask=there, other=0.0).to(tl.float32)
        output = y_ptr + row.to(tl.int64)[:, None] * y_pitch + column[None, :]
        tl.store(output, sums.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, rows_used_ptr, rows, N, x_pitch, y_pitch, eps,
    LAYER_NORM: tl.constexpr, BOUNDED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row of a LayerNorm, or of a NoNorm."""
    row = tl.program_id(0)
    column = tl.arange(0, BN)
    there = column < N
    used = rows
    if BOUNDED:
        used = tl.load(rows_used_ptr)
    if row < used:
        x = tl.load(x_ptr + row.to(tl.int64) * x_pitch + column, mask=there, other=0.0).to(tl.float32)
        if LAYER_NORM:
            x = tl.where(there, x - tl.sum(x, 0) / N, 0.0)
            x = x / tl.sqrt(tl.sum(x * x, 0) / N + eps)
        weight = tl.load(w_ptr + column, mask=there, other=0.0).to(tl.float32)
        bias = tl.load(b_ptr + column, mask=there, other=0.0).to(tl.float32)
        y = (x * weight + bias).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row.to(tl.int64) * y_pitch + column, y, mask=there)


@triton.jit
def _attention_kernel(
    qkv_ptr, o_ptr, cu_seqlens_ptr, pitch, o_pitch, heads, D, scale,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head of one sequence, over its keys in tiles of BN (see csrc/cuda/pruned_attention.cu)."""
    head = tl.program_id(1)
    begin = tl.load(cu_seqlens_ptr + tl.program_id(2))
    length = tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - begin
    if tl.program_id(0) * BM < length:
        query = tl.program_id(0) * BM + tl.arange(0, BM)
        d = tl.arange(0, BD)
        base = qkv_ptr + begin.to(tl.int64) * pitch + head * D
        of_queries = (query[:, None] < length) & (d[None, :] < D)
        q = tl.load(base + query.to(tl.int64)[:, None] * pitch + d[None, :], mask=of_queries, other=0.0)
        largest = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        context = tl.zeros((BM, BD), tl.float32)
        for first in range(0, length, BN):
            key = first + tl.arange(0, BN)
            k_ptr = base + heads * D + key.to(tl.int64)[None, :] * pitch + d[:, None]
            k = tl.load(k_ptr, mask=(key[None, :] < length) & (d[:, None] < D), other=0.0)
            scores = tl.dot(q, k, input_precision="ieee") * scale
            scores = tl.where(key[None, :] < length, scores, float("-inf"))
            before = largest
            largest = tl.maximum(before, tl.max(scores, 1))
            weights = tl.math.exp2(scores - largest[:, None])
            rescale = tl.math.exp2(before - largest)
            total = total * rescale + tl.sum(weights, 1)
            v_ptr = base + 2 * heads * D + key.to(tl.int64)[:, None] * pitch + d[None, :]
            v = tl.load(v_ptr, mask=(key[:, None] < length) & (d[None, :] < D), other=0.0)
            context = tl.dot(weights.to(v.dtype), v, context * rescale[:, None], input_precision="ieee")
        o = o_ptr + (begin + query).to(tl.int64)[:, None] * o_pitch + head * D + d[None, :]
        tl.store(o, (context / total[:, None]).to(o_ptr.dtype.element_ty), mask=of_queries)


# ------------------------------------------------------------------------------------------- choice of a tile


class Tile(NamedTuple):
    """How `_linear_kernel` is cut and compiled."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def linear_tiles(float32: bool) -> tuple[Tile, ...]:
    """What is tried for `_linear_kernel`. Few: each is compiled. Longer steps in float32 spill registers."""
    step = 16 if float32 else 32
    return Tile(128, 64, step, 8, 3), Tile(64, 64, step, 4, 4), Tile(32, 64, step, 4, 4), Tile(16, 64, 2 * step, 4, 4)


_chosen: dict[tuple[Any, ...], Tile] = {}


def bucket(rows: int, out_features: int, in_features: int) -> tuple[int, int, int]:
    """What shapes share a choice, so that a new length never starts a new search: powers of four."""

    def power(size: int, least: int, most: int) -> int:
        return next((p for p in (least * 4**i for i in range(8)) if p >= size or p >= most), most)

    return power(rows, 16, 4096), power(out_features, 64, 1024), power(in_features, 64, 1024)


def choose_tile(key: tuple[Any, ...], run: Callable[[Tile], object], tiles: Sequence[Tile]) -> Tile:
    """The fastest of `tiles` at the first call with that key; afterwards what was chosen then.

    Args:
        key: what shares a choice: device, dtype, `bucket`.
        run: launches the kernel with a tile, on the caller's own data; it may be repeated.
        tiles: what to try.
    """
    if key not in _chosen:
        seconds = {tile: triton.testing.do_bench(functools.partial(run, tile), warmup=2, rep=10) for tile in tiles}
        _chosen[key] = min(tiles, key=seconds.__getitem__)
    return _chosen[key]


# --------------------------------------------------------------------------------------------------- launches

P = ParamSpec("P")


def _on_its_device(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """On the device of its first argument: Triton launches on the current one, whatever tensors it is given."""

    @functools.wraps(function)
    def guarded(first: Tensor, *rest: P.args, **named: P.kwargs) -> Tensor:
        with torch.cuda.device_of(first):
            return function(first, *rest, **named)

    return guarded


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    rows_used: Tensor | None = None,
) -> Tensor:
    """activation(input weight^T + bias) + residual for 2-D input; rows from `rows_used` [1] on stay unwritten."""
    rows, in_features = input.shape
    out_features = weight.shape[0]
    output = input.new_empty(rows, out_features)
    if output.numel() == 0:
        return output

    def run(tile: Tile) -> None:
        grid = (triton.cdiv(rows, tile.BM), triton.cdiv(out_features, tile.BN))
        _linear_kernel[grid](
            *(input, weight, bias, residual if residual is not None else input, output),
            *(rows_used if rows_used is not None else input, rows, out_features, in_features),
            *(input.stride(0), 0 if residual is None else residual.stride(0), output.stride(0)),
            ACTIVATION=activation,
            RESIDUAL=residual is not None,
            BOUNDED=rows_used is not None,
            **tile._asdict(),
        )

    tiles = linear_tiles(input.dtype == torch.float32)
    capturing = input.is_cuda and torch.cuda.is_current_stream_capturing()
    key = (input.device, input.dtype, *bucket(rows, out_features, in_features))
    if INTERPRETED or (capturing and key not in _chosen):
        run(tiles[1])  # nothing to time
    else:
        run(choose_tile(key, run, tiles))
    return output


def _normalize(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, rows_used: Tensor | None = None
) -> Tensor:
    """The norm of each row of x [rows, size], in place."""
    rows, size = x.shape
    if norm == "none" or x.numel() == 0:
        return x
    _norm_kernel[(rows,)](
        *(x, weight, bias, x, rows_used if rows_used is not None else x, rows, size, x.stride(0), x.stride(0), eps),
        LAYER_NORM=norm == "layer_norm",
        BOUNDED=rows_used is not None,
        BN=triton.next_power_of_2(size),
    )
    return x


@_on_its_device
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
    """As `ops.packed_linear`, with the canonical weight, in float32, float16 or bfloat16."""
    count, out_features = math.prod(input.shape[:-1]), weight.shape[0]
    rows = input.reshape(count, input.shape[-1]).contiguous()
    flat = None if residual is None else residual.reshape(count, out_features).contiguous()
    output = _linear(rows, weight.contiguous(), bias.contiguous(), activation, flat)
    return _normalize(output, norm, norm_weight, norm_bias, eps).view(*input.shape[:-1], out_features)


def attention_tile(float32: bool, head_size: int) -> tuple[int, int]:
    """Queries and keys of a block of `_attention_kernel`: as many as its registers hold."""
    if float32:
        return (16, 16) if head_size > 64 else (32, 32)
    if head_size > 64:
        return 32, 32
    return 64, 64 if head_size <= 32 else 32


@_on_its_device
def pruned_attention(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, max_length: int | None = None) -> Tensor:
    """As `ops.pruned_attention` in float. `max_length`: of a sequence, at most; else all tokens may be one's."""
    tokens, width = qkv.shape[0], qkv.shape[1] // 3
    output = qkv.new_empty(tokens, width)
    sequences = cu_seqlens.shape[0] - 1
    if output.numel() == 0 or sequences == 0:
        return output
    head_size = width // num_heads
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(f"packedbert::pruned_attention: heads of at most {MAX_HEAD_SIZE} dimensions, got {head_size}")
    queries, keys = attention_tile(qkv.dtype == torch.float32, head_size)
    qkv = qkv.contiguous()
    _attention_kernel[(triton.cdiv(max_length or tokens, queries), num_heads, sequences)](
        *(qkv, output, cu_seqlens, qkv.stride(0), output.stride(0), num_heads, head_size),
        1.4426950408889634 / head_size**0.5,
        BD=max(16, triton.next_power_of_2(head_size)),
        BM=queries,
        BN=keys,
        num_warps=4,
        num_stages=2,
    )
    return output


@_on_its_device
def encoder(
    hidden_states: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: Sequence[int],
    activation: str,
    norm: str,
    eps: float,
) -> Tensor:
    """As `ops.encoder` on canonical weights; `mask` is bool. Nothing in it waits for the GPU."""
    batch, length, hidden_size = hidden_states.shape
    tokens = hidden_states.reshape(batch * length, hidden_size)
    x, place = tokens.contiguous(), None
    if mask is None:
        cu_seqlens = torch.arange(batch + 1, device=x.device, dtype=torch.int32) * length
        rows_used = None
    else:
        cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        rows_used = cu_seqlens[-1:]
        # Where each token goes: the real ones to the front, in their order, the others to one row more.
        real = mask.flatten()
        place = torch.where(real, real.cumsum(0) - 1, batch * length)
        x = tokens.new_zeros(batch * length + 1, hidden_size).index_copy_(0, place, tokens)[:-1]
        x = x.contiguous()

    def linear(
        input: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", residual: Tensor | None = None,
        norm: str = "none", norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 0.0,
    ) -> Tensor:  # fmt: skip
        output = _linear(input, weight, bias, activation, residual, rows_used)
        return _normalize(output, norm, norm_weight, norm_bias, eps, rows_used)

    for heads, w in zip(num_heads, reference.split_layers(weights), strict=True):
        attend = functools.partial(_attend, cu_seqlens=cu_seqlens, heads=heads, max_length=length)
        x = reference.layer(x, w, attend, activation, norm, eps, linear)
    if place is not None:
        assert mask is not None
        # A row that is no token's may hold anything, a NaN too.
        x = torch.where(mask.view(-1, 1), x[place.clamp(max=batch * length - 1)], 0)
    return x.reshape(hidden_states.shape).to(hidden_states.dtype)


def _attend(qkv: Tensor, cu_seqlens: Tensor, heads: int, max_length: int) -> Tensor:
    return pruned_attention(qkv, cu_seqlens, heads, max_length)
