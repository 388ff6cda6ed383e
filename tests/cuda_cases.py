"""Calls of the kernels, each with its oracle: for CUDA's, emulated and as PTX, and for those of every other backend.

A `Case` is a call of a method of `cuda_emulator.Kernels` with numpy arguments, what reference.py makes of the same
numbers in float64, and what PyTorch itself makes of them in the kernel's dtype.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from op_cases import assert_as_exact_as_torch, ragged_qkv, random_layers

from packedbert import reference

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HALVES = ("float16", "bfloat16")
PLANS = ((128, 128), (64, 64), (32, 64))  # tiles of packed_linear


@dataclass
class Case:
    """One call, and what is expected of it."""

    name: str
    method: str
    arguments: dict[str, Any]
    oracle: torch.Tensor  # float64
    own: torch.Tensor  # PyTorch's, in the dtype
    written: int | None = None  # so many rows have to be; None: all

    def check(self, result: np.ndarray | torch.Tensor) -> None:
        """Hold a result of the kernel to the bound that every kernel is held to."""
        got = result if isinstance(result, torch.Tensor) else to_torch(result, self.own.dtype)
        assert got.dtype == self.own.dtype
        written = slice(self.written)
        assert_as_exact_as_torch(got[written], self.own[written], self.oracle[written])

    def as_op(self, ops: Any) -> torch.Tensor:
        """The same of `packed_linear` (canonical weight), `pruned_attention` or `encoder` of a module."""
        given = self.arguments
        dtype = TORCH[given["dtype"]]

        def take(*names: str) -> list[torch.Tensor | None]:
            return [None if given[name] is None else to_torch(given[name], dtype) for name in names]

        if self.method == "linear":
            x, weight, bias, residual = take("input", "weight", "bias", "residual")
            return ops.packed_linear(x, weight, bias, given["activation"], residual, "none", None, None, 1e-5)
        if self.method == "rows":  # has no product: a weight that changes nothing
            x, bias, residual, *affine = take("input", "bias", "residual", "norm_weight", "norm_bias")
            weight = torch.eye(x.shape[1], dtype=dtype)
            return ops.packed_linear(x, weight, bias, given["activation"], residual, given["norm"], *affine, 1e-5)
        if self.method == "attention":
            return ops.pruned_attention(*take("qkv"), torch.from_numpy(given["cu_seqlens"]), given["heads"])
        mask = None if given["mask"] is None else torch.from_numpy(given["mask"])
        weights = [to_torch(weight, dtype) for weight in given["weights"]]
        rest = (given["num_heads"], given["activation"], given["norm"], 1e-12)
        return ops.encoder(*take("hidden_states"), mask, weights, *rest)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_torch(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(array)


def _rounded(dtype: str, seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(TORCH[dtype]) for shape in shapes]


def linear(dtype, tile, rows, in_features, out_features, activation="none", residual=False, splits=1, padded_rows=True,
           rows_used=None) -> Case:  # fmt: skip
    """activation "sums": the products alone, in float."""
    x, w, b, r = _rounded(dtype, rows + 7 * in_features, (rows, in_features), (out_features, in_features),
                          (out_features,), (rows, out_features))  # fmt: skip
    w = (w.double() / max(in_features, 1) ** 0.5).to(TORCH[dtype])
    sums = activation == "sums"
    r = r if residual else None
    epilogue = {"activation": "none" if sums else activation, "residual": r}
    zeros = torch.zeros_like(b)
    own = reference.packed_linear(x, w, zeros if sums else b, **epilogue)
    epilogue["residual"] = None if r is None else r.double()
    oracle = reference.packed_linear(x.double(), w.double(), (zeros if sums else b).double(), **epilogue)
    if sums:  # in float: much more exact than half precision
        own = reference.packed_linear(x.float(), w.float(), zeros.float()).double()
    arguments = {
        "dtype": dtype, "input": to_numpy(x), "weight": to_numpy(w), "bias": to_numpy(b), "plan": (*tile, splits),
        "activation": activation, "residual": None if r is None else to_numpy(r), "padded_rows": padded_rows,
        "rows_used": rows_used,
    }  # fmt: skip
    name = f"linear-{dtype}-{tile[0]}x{tile[1]}-{rows}x{in_features}x{out_features}-{activation}"
    name += f"{'-residual' * residual}-{splits}{'-odd' * (not padded_rows)}{'' if rows_used is None else '-part'}"
    return Case(name, "linear", arguments, oracle, own, rows_used)


def rows(dtype, count, size, norm="layer_norm", activation="none", splits=0, residual=True, padded_rows=True) -> Case:
    """`splits` 0: of an input in the dtype; else of so many parts in float."""
    r, b, weight, bias = _rounded(dtype, count + size, (count, size), *[(size,)] * 3)
    parts = torch.randn(max(splits, 1), count, size, generator=torch.Generator().manual_seed(1))
    x = parts[0].to(TORCH[dtype])
    before = x.double() if splits == 0 else parts.double().sum(0)
    tail = (norm, weight, bias) if norm != "none" else (norm, None, None)

    def expected(cast):
        y = reference.ACTIVATIONS[activation](cast(before) + cast(b))
        y = y + cast(r) if residual else y
        return reference.normalize(y, norm, *(None if t is None else cast(t) for t in tail[1:]), 1e-5)

    arguments = {
        "dtype": dtype, "sums": parts.numpy() if splits else None, "input": None if splits else to_numpy(x),
        "bias": to_numpy(b), "residual": to_numpy(r) if residual else None, "activation": activation, "norm": norm,
        "norm_weight": None if norm == "none" else to_numpy(weight),
        "norm_bias": None if norm == "none" else to_numpy(bias), "padded_rows": padded_rows,
    }  # fmt: skip
    name = f"rows-{dtype}-{count}x{size}-{norm}-{activation}-{splits}{'-residual' * residual}"
    own = expected(lambda tensor: tensor.to(TORCH[dtype]))
    return Case(name + "-odd" * (not padded_rows), "rows", arguments, expected(torch.Tensor.double), own)


def attention(dtype, lengths, heads, head_size, padded_rows=True, size=1.0) -> Case:
    exact, bounds = ragged_qkv(lengths, heads, head_size, size)
    qkv = exact.to(TORCH[dtype])
    arguments = {"dtype": dtype, "qkv": to_numpy(qkv), "cu_seqlens": bounds.numpy(), "heads": heads,
                 "padded_rows": padded_rows}  # fmt: skip
    oracle = reference.pruned_attention(qkv.double(), bounds, heads)
    name = f"attention-{dtype}-{'_'.join(map(str, lengths))}-{heads}x{head_size}{'-odd' * (not padded_rows)}"
    return Case(name, "attention", arguments, oracle, reference.pruned_attention(qkv, bounds, heads))


#: A mask with a hole, a row without tokens, and a full one.
MASK = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0] * 7, [1] * 7]).bool()


def encoder(dtype, hidden, layers, mask=None, length=7, norm="layer_norm", activation="gelu") -> Case:
    """Three sequences, NaN where they are padded; `layers`: heads, their size, FFN rows."""
    weights = []
    for seed, (heads, head_size, width) in enumerate(layers):
        weights += random_layers([heads], [width], head_size, hidden, TORCH[dtype], seed)
    (states,) = _rounded(dtype, hidden, (3, length, hidden))
    num_heads = [heads for heads, _, _ in layers]
    rest = (num_heads, activation, norm, 1e-12)
    own = reference.encoder(states, mask, weights, *rest)
    oracle = reference.encoder(states.double(), mask, [weight.double() for weight in weights], *rest)
    if mask is not None:
        states[~mask] = float("nan")  # has no influence
    arguments = {
        "dtype": dtype, "hidden_states": to_numpy(states), "mask": None if mask is None else mask.numpy(),
        "weights": [to_numpy(weight) for weight in weights], "num_heads": num_heads, "activation": activation,
        "norm": norm,
    }  # fmt: skip
    name = f"encoder-{dtype}-{hidden}-{'_'.join('x'.join(map(str, layer)) for layer in layers)}-{norm}"
    name += f"-{'all' if mask is None else int(mask.sum())}"
    return Case(name, "encoder", arguments, oracle, own)


def small_encoders() -> list[Case]:
    """Layers without heads or FFN, heads of several sizes, sizes that fit no tile, any mask."""
    cases = []
    for dtype, mask in itertools.product(TORCH, (None, MASK, torch.zeros_like(MASK))):
        cases.append(encoder(dtype, 64, [(2, 24, 5), (0, 24, 9), (1, 32, 0)], mask))
        cases.append(encoder(dtype, 21, [(3, 5, 33)], mask, norm="no_norm", activation="relu"))
        cases.append(encoder(dtype, 8, [], mask))
    return cases


def small_cases() -> list[Case]:
    """Each instantiation at least once, on as few blocks as show its edges."""
    cases = []
    for dtype, tile in itertools.product(HALVES, PLANS):
        cases.append(linear(dtype, tile, tile[0] + 1, 77, tile[1] + 5, "gelu", residual=True))
        cases.append(linear(dtype, tile, 3, 600, 70, "sums", splits=2))  # more steps than any tile has stages
    for dtype in TORCH:
        cases += [rows(dtype, 5, size, splits=splits) for size, splits in ((77, 0), (768, 2), (800, 0), (1030, 1))]
        cases.append(rows(dtype, 3, 9, norm="no_norm", padded_rows=False))
        cases += [attention(dtype, (0, 65, 1), 1, head_size) for head_size in (32, 64)]
        cases += [attention(dtype, (3, 65), 1, 80), attention(dtype, (5,), 2, 12, padded_rows=False)]
    return cases


def all_cases() -> list[Case]:
    """Every instantiation with every epilogue, at sizes about its tile's."""
    cases = small_cases()
    for dtype, tile in itertools.product(HALVES, PLANS):
        for count in (0, 1, tile[0] - 1, tile[0], tile[0] + 1):
            cases.append(linear(dtype, tile, count, 32, tile[1]))
        for in_features, out_features in ((0, 9), (1, 1), (31, 63), (33, 65), (64, 64), (129, tile[1] + 1)):
            cases.append(linear(dtype, tile, 5, in_features, out_features, "relu"))
        for activation, residual in itertools.product(reference.ACTIVATIONS, (False, True)):
            cases.append(linear(dtype, tile, 9, 70, 72, activation, residual))
            cases.append(linear(dtype, tile, 9, 70, 71, activation, residual, padded_rows=False))
        for splits in (1, 2, 3, 4):
            cases.append(linear(dtype, tile, 33, 128, 67, "sums", splits=splits))
        cases.append(linear(dtype, tile, tile[0] + 3, 64, 64, rows_used=2))
    for dtype in TORCH:
        for norm, residual, splits in itertools.product(reference.NORMS, (False, True), (0, 1, 3)):
            cases.append(rows(dtype, 5, 384, norm, residual=residual, splits=splits))
            cases.append(rows(dtype, 5, 1025, norm, residual=residual, splits=splits, padded_rows=False))
        for length in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129):
            cases.append(attention(dtype, (length,), 1, 64))
        cases.append(attention(dtype, (0, 0), 2, 32))
        cases.append(attention(dtype, (0, 200, 0, 3, *[1] * 40), 2, 32))
        cases.append(attention(dtype, (70, 7), 2, 128))
        cases.append(attention(dtype, (70, 7), 3, 5, padded_rows=False))
        cases.append(attention(dtype, (70,), 1, 64, size=8.0))
    # Scores of 1e9 and more, which float16 cannot hold.
    cases += [attention(dtype, (70, 7), 1, 80, size=1e5) for dtype in ("float32", "bfloat16")]
    for activation in reference.ACTIVATIONS:
        cases.append(rows("float32", 5, 384, "none", activation, splits=1, residual=False))
        cases.append(rows("float32", 5, 77, "layer_norm", activation, splits=1))
    return cases
