"""Every op against the best peer kernel and the machine's own floors: `python benchmarks/bench_ops.py [--tiny]`.

The shapes are those of one layer of the seed's structure. An op is checked against its float64 reference before it is
timed. Two floors go with every row: the operations at the register-only peak of their precision, and the bytes that
have to be read or written at least once at the rate of a copy. Caches are warm, as they are between the ops of a
layer, so the second one can be undercut.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import record
import torch
from machine import Machine
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from packedbert import bench, ops, quantization, reference

#: Seconds that each contestant is timed for, and the fewest and most calls.
BUDGET, LEAST, MOST = 0.4, 5, 400

#: Our error against float64 may be so many times that of PyTorch's own kernel in float32, a peer's so many times, both
#: plus so much of the result's spread.
OURS_TIMES, PEERS_TIMES, OF_SPREAD = 2, 10, 1e-6

#: In int8 ours has the bits of its oracle, up to the bias; another rounding may differ by so much of the spread.
INT8_SPREAD = 0.2

TOKENS = (32, 128, 1024, 3072)
BATCHES = ((1, 128), (1, 384), (8, 128), (8, 384))

Contestant = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        shape: what it is, for the table.
        contestants: ours first, then peers by name.
        expected: the float64 result.
        flops: floating-point operations.
        values: floats that have to be read or written at least once.
        precision: of the product.
    """

    op: str
    shape: str
    contestants: dict[str, Contestant]
    expected: Tensor
    flops: int
    values: int
    precision: str = "fp32"


def int8_case(name: str, tokens: int, out_features: int, in_features: int) -> Case:
    """packed_linear with an int8 weight, against PyTorch's dynamic quantization.

    The expected result is our own rounding's (the kernel has to have its bits); a peer rounds otherwise. PyTorch
    quantizes inputs to 7 bits, because its products saturate otherwise where there is no VNNI.
    """
    x, weight = torch.randn(tokens, in_features), torch.randn(out_features, in_features) * in_features**-0.5
    bias = torch.randn(out_features)
    quantized = quantization.quantize_weight(weight)
    packed = quantization.pack_quantized(quantized)
    contestants: dict[str, Contestant] = {"packedbert": lambda: ops.packed_linear(x, packed, bias)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scales = weight.abs().amax(1) / 127
        zeros = torch.zeros(out_features, dtype=torch.long)
        per_channel = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        prepacked = torch.ops.quantized.linear_prepack(per_channel, bias)
    contestants["PyTorch dynamic"] = lambda: torch.ops.quantized.linear_dynamic(x, prepacked, reduce_range=True)
    return Case(
        "packed_linear",
        f"{name}: {tokens} x {in_features} -> {out_features}",
        contestants,
        quantization.quantized_product(x, quantized).double() + bias,
        2 * tokens * out_features * in_features,
        weight.numel() // 4 + x.numel() + tokens * out_features,
        "int8",
    )


def linear_case(name: str, tokens: int, out_features: int, in_features: int, activation: str, residual: bool) -> Case:
    """packed_linear with the epilogue that it has in the encoder, against eager and oneDNN's prepacked linear."""
    x, weight = torch.randn(tokens, in_features), torch.randn(out_features, in_features) * in_features**-0.5
    bias, old = torch.randn(out_features), torch.randn(tokens, out_features)
    gain, shift = torch.ones(out_features), torch.zeros(out_features)
    packed = ops.prepack_linear(weight)
    norm = ("layer_norm", gain, shift) if residual else ("none", None, None)
    epilogue = (activation, old if residual else None, *norm, 1e-12)

    def finish(y: Tensor) -> Tensor:
        if activation == "gelu":
            return functional.gelu(y)
        return functional.layer_norm(y + old, (out_features,), gain, shift, 1e-12) if residual else y

    contestants: dict[str, Contestant] = {
        "packedbert": lambda: ops.packed_linear(x, packed, bias, *epilogue),
        "PyTorch eager": lambda: finish(functional.linear(x, weight, bias)),
    }
    if torch.backends.mkldnn.is_available():
        # The kernel that torch.compile takes for a frozen linear layer: GELU is among its epilogues, LayerNorm isn't.
        onednn = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
        fused = activation == "gelu"

        def run() -> Tensor:
            y = torch.ops.mkldnn._linear_pointwise(x, onednn, bias, "gelu" if fused else "none", [], "none")
            return y if fused else finish(y)

        contestants["oneDNN prepacked"] = run
    double = [value.double() if isinstance(value, Tensor) else value for value in (x, weight, bias, *epilogue)]
    return Case(
        "packed_linear",
        f"{name}: {tokens} x {in_features} -> {out_features}",
        contestants,
        reference.packed_linear(*double),
        2 * tokens * out_features * in_features,
        weight.numel() + x.numel() + (2 if residual else 1) * tokens * out_features,
    )


def attention_case(batch: int, length: int, heads: int, head_size: int) -> Case:
    """pruned_attention from fused q, k and v, against SDPA."""
    inner = heads * head_size
    qkv = torch.randn(batch * length, 3 * inner)
    bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32)

    def sdpa() -> Tensor:
        q, k, v = qkv.view(batch, length, 3, heads, head_size).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch * length, inner)

    return Case(
        "pruned_attention",
        f"{batch} x {length}, {heads} heads",
        {"packedbert": lambda: ops.pruned_attention(qkv, bounds, heads), "PyTorch SDPA": sdpa},
        reference.pruned_attention(qkv.double(), bounds, heads),
        4 * batch * length * length * inner,
        4 * batch * length * inner,
    )


def prepack_case(out_features: int, in_features: int) -> Case:
    """prepack_linear, against a copy."""
    weight = torch.randn(out_features, in_features)
    panels, _, width = ops.prepack_linear(weight).shape
    padded = functional.pad(weight.double(), (0, 0, 0, panels * width - out_features))
    return Case(
        "prepack_linear",
        f"{out_features} x {in_features}",
        {"packedbert": lambda: ops.prepack_linear(weight), "PyTorch clone": weight.clone},
        padded.view(panels, width, in_features).transpose(1, 2),
        0,
        2 * weight.numel(),
    )


def encoder_case(batch: int, length: int, structure: bench.Structure) -> Case:
    """The whole encoder, against the same weights in stock modules."""
    models = bench.build_models(structure)
    packed, stock = models.patched.bert.encoder, models.eager.bert.encoder
    hidden = torch.randn(batch, length, structure.hidden_size)
    weights = packed.weights()
    flops = structure.flops(batch, length) - 4 * batch * length * structure.hidden_size
    return Case(
        "encoder",
        f"{batch} x {length}, {len(structure.heads)} layers",
        {
            "packedbert": lambda: packed(hidden).last_hidden_state,
            "PyTorch eager": lambda: stock(hidden).last_hidden_state,
        },
        reference.encoder(
            hidden.double(), None, [w.double() for w in weights], packed._num_heads, "gelu", "layer_norm", 1e-12
        ),
        flops,
        sum(weight.numel() for weight in weights) + 2 * hidden.numel(),
    )


def cases(tiny: bool) -> Iterator[Case]:
    """All of them, each made when its turn comes."""
    structure = bench.STRUCTURES["tiny"] if tiny else bench.SEED
    layer = min(3, len(structure.heads) - 1)
    hidden, heads, width = structure.hidden_size, structure.heads[layer], structure.ffn_widths[layer]
    head_size = hidden // structure.num_heads
    inner = heads * head_size
    for tokens in (8,) if tiny else TOKENS:
        yield linear_case("qkv", tokens, 3 * inner, hidden, "none", False)
        yield linear_case("attention output", tokens, hidden, inner, "none", True)
        yield linear_case("FFN up", tokens, width, hidden, "gelu", False)
        yield linear_case("FFN down", tokens, hidden, width, "none", True)
        yield int8_case("qkv", tokens, 3 * inner, hidden)
        yield int8_case("FFN down", tokens, hidden, width)
    for batch, length in ((2, 8),) if tiny else BATCHES:
        yield attention_case(batch, length, heads, head_size)
    yield prepack_case(width, hidden)
    for batch, length in ((2, 8),) if tiny else BATCHES:
        yield encoder_case(batch, length, structure)


def check(case: Case) -> None:
    """Every contestant has to be right before its time counts.

    Raises:
        SystemExit: one isn't.
    """
    checked = dict(case.contestants)
    if case.op == "prepack_linear":
        del checked["PyTorch clone"]  # it has the weight's own layout
    errors = {name: (run() - case.expected).abs().max().item() for name, run in checked.items()}
    pytorch = next((error for name, error in errors.items() if name.startswith("PyTorch")), 0.0)
    for name, error in errors.items():
        times = OURS_TIMES if name == "packedbert" else PEERS_TIMES
        limit = times * pytorch + OF_SPREAD * case.expected.std().item()
        if case.precision == "int8":
            limit = (OF_SPREAD if name == "packedbert" else INT8_SPREAD) * case.expected.std().item()
        if not error <= limit:
            raise SystemExit(f"{case.op} ({case.shape}): {name} is wrong: off by {error:.2g}, limit {limit:.2g}")


def peak(about: Machine, case: Case) -> float:
    """The arithmetic that the machine can do at best, in the case's precision."""
    assert about.peaks is not None
    return about.peaks.best(case.precision)


def rows(all_cases: list[Case], about: Machine) -> Iterator[dict[str, Any]]:
    """The CSV's rows: one contestant in one case each."""
    for case in all_cases:
        check(case)
        calls = {name: lambda _, run=run: run() for name, run in case.contestants.items()}
        (slowest,) = max(bench.interleaved(calls, 1, warmup=1).values())
        times = bench.interleaved(calls, max(LEAST, min(MOST, int(BUDGET / slowest))), warmup=1)
        medians = {name: record.summary(seconds)["median_ms"] / 1e3 for name, seconds in times.items()}
        best_peer = min(seconds for name, seconds in medians.items() if name != "packedbert")
        for name, seconds in times.items():
            median = medians[name]
            yield {
                "op": case.op,
                "precision": case.precision,
                "shape": case.shape,
                "kernel": name,
                **record.summary(seconds),
                "gflop_s": round(case.flops / median / 1e9, 1),
                "gb_s": round(4 * case.values / median / 1e9, 1),
                "peak_floor_ms": "" if about.peaks is None else round(1e3 * case.flops / peak(about, case), 4),
                "copy_floor_ms": round(4e3 * case.values / about.copy_bytes, 4),
                "times_best_peer": round(best_peer / median, 3),
            }


@click.command()
@click.option("--tiny", is_flag=True, help="Toy sizes: seconds; checks that the benchmark still runs.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of every kernel.")
@click.option("--out", type=click.Path(path_type=Path), default=record.RESULTS / "ops.csv", show_default=True)
def main(tiny: bool, threads: int, out: Path) -> None:
    """Time every op at the shapes of the seed's fourth layer."""
    torch.manual_seed(0)
    about = Machine.measure(threads)
    with torch.inference_mode():
        every = track(list(cases(tiny)), "ops", console=record.console, transient=True)
        record.write(out, rows(every, about), about)


if __name__ == "__main__":
    main()
