"""What the CUDA kernels have to move and to compute, and the least time for it: `python benchmarks/gpu_roofline.py`.

**Estimated, not measured.** For each launch of the seed's encoder in half precision: the distinct bytes that it reads
and writes, its floating-point operations, and on each GPU the larger of bytes over bandwidth and operations over the
tensor cores' rate. A launch can't take less; it will take more. "floor" is a layer that were one launch: its weights
once, its input and its output.

tests/test_gpu_roofline.py holds the bytes to those that the emulated kernels touch.
"""

from __future__ import annotations

import csv
import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
from record import RESULTS, console
from rich.table import Table

from packedbert.bench import SEED

ROOT = Path(__file__).resolve().parents[1]

HALF = 2  # bytes
FLOAT = 4
TILE_OUTPUTS, TILE_INPUTS = 64, 32  # csrc/packed_layout.h


class Gpu(NamedTuple):
    """Rates from the makers' data sheets: dense half precision with float32 sums, and memory."""

    tflops: float
    gb_per_second: float
    multiprocessors: int


#: NVIDIA's GA102 whitepaper (appendix A), A100 80 GB SXM and H100 SXM data sheets. mma.sync, which we use, does not
#: reach the H100's rate, which is that of wgmma.
GPUS = {
    "RTX 3090": Gpu(71.0, 936.0, 82),
    "A100": Gpu(312.0, 2039.0, 108),
    "H100": Gpu(989.0, 3350.0, 132),
}

#: (tokens, sequences) that are tabulated: one short text, one long one, a batch.
CELLS = ((32, 1), (128, 1), (384, 1), (1024, 8), (4096, 32))

#: (rows, out_features, in_features, multiprocessors, may_split) -> (rows, columns, splits), as csrc does it.
Plan = Callable[[int, int, int, int, bool], Sequence[int]]


@dataclass(frozen=True)
class Launch:
    """One launch: distinct bytes, and floating-point operations."""

    name: str
    read: int
    written: int
    flop: int = 0

    def seconds(self, gpu: Gpu) -> float:
        """The least time it takes."""
        return max((self.read + self.written) / (gpu.gb_per_second * 1e9), self.flop / (gpu.tflops * 1e12))


def packed_bytes(out_features: int, in_features: int) -> int:
    """Of a prepacked weight, with its padding."""
    tiles, steps = -(-out_features // TILE_OUTPUTS), -(-in_features // TILE_INPUTS)
    return tiles * steps * TILE_OUTPUTS * TILE_INPUTS * HALF


def layer_launches(
    tokens: int,
    sequences: int,
    hidden_size: int,
    heads: int,
    head_size: int,
    width: int,
    multiprocessors: int,
    plan: Plan,
) -> list[Launch]:
    """The launches of one layer, in their order, on `tokens` real tokens without padding."""
    inner = heads * head_size
    hidden = tokens * hidden_size * HALF
    vector = hidden_size * HALF

    def linear(name: str, out_features: int, in_features: int) -> Launch:
        read = tokens * in_features * HALF + packed_bytes(out_features, in_features) + out_features * HALF
        flop = 2 * tokens * out_features * in_features
        return Launch(name, read, tokens * out_features * HALF, flop)

    def linear_and_norm(name: str, in_features: int) -> list[Launch]:
        if in_features == 0:  # what is left is a bias
            return [Launch(f"{name}, norm", hidden + 3 * vector, hidden)]
        splits = plan(tokens, hidden_size, in_features, multiprocessors, True)[2]
        whole = linear(name, hidden_size, in_features)
        if splits == 1:
            product = Launch(name, whole.read + hidden, hidden, whole.flop)
            return [product, Launch(f"{name}, norm", hidden + 2 * vector, hidden)]
        sums = splits * tokens * hidden_size * FLOAT
        product = Launch(name, whole.read - vector, sums, whole.flop)
        return [product, Launch(f"{name}, norm", sums + hidden + 3 * vector, hidden)]

    launches = []
    if inner:
        launches.append(linear("qkv", 3 * inner, hidden_size))
        # Each query of a sequence looks at each key: here of sequences of one length.
        flop = 4 * tokens * (tokens // sequences) * inner
        context = tokens * inner * HALF
        launches.append(Launch("attention", 3 * context + (sequences + 1) * 4, context, flop))
    launches += linear_and_norm("attention output", inner)
    if width:
        launches.append(linear("up", width, hidden_size))
    return launches + linear_and_norm("down", width)


def floor(tokens: int, hidden_size: int, heads: int, head_size: int, width: int) -> Launch:
    """A layer in one launch."""
    inner = heads * head_size
    weights = 4 * inner * hidden_size + 2 * width * hidden_size + 3 * inner + width + 6 * hidden_size
    hidden = tokens * hidden_size * HALF
    flop = 2 * tokens * (4 * inner + 2 * width) * hidden_size
    return Launch("floor", weights * HALF + hidden, hidden, flop)


def emulated_plan() -> Plan:
    """The plan that the library makes: a pure function of csrc, called through the tests' emulator."""
    sys.path.append(str(ROOT / "tests"))
    import cuda_emulator

    if reason := cuda_emulator.why_not():
        raise click.ClickException(f"the plan of a product comes from csrc, but it can't be compiled here: {reason}")
    return cuda_emulator.Kernels(only_record=True).plan


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "gpu_roofline.csv", show_default=True)
def main(out: Path) -> None:
    """Tabulate bytes, operations and the least times of the seed's launches. Estimated, not measured."""
    plan = emulated_plan()
    rows = []
    table = Table(title="the seed's encoder in half precision, least time in us: ESTIMATED, NOT MEASURED")
    for column in ("GPU", "tokens", "launches", "launches' sum", "floor", "bytes / floor's"):
        table.add_column(column, justify="right" if column != "GPU" else "left")
    for name, gpu in GPUS.items():
        for tokens, sequences in CELLS:
            total = least = 0.0
            moved = needed = count = 0
            for index, (heads, width) in enumerate(zip(SEED.heads, SEED.ffn_widths, strict=True)):
                sizes = (SEED.hidden_size, heads, SEED.hidden_size // SEED.num_heads, width)
                launches = layer_launches(tokens, sequences, *sizes, gpu.multiprocessors, plan)
                bound = floor(tokens, *sizes)
                for launch in (*launches, bound):
                    rows.append({
                        "gpu": name, "tokens": tokens, "sequences": sequences, "layer": index, "launch": launch.name,
                        "bytes_read": launch.read, "bytes_written": launch.written, "flop": launch.flop,
                        "least_us": round(launch.seconds(gpu) * 1e6, 3), "origin": "estimated, not measured",
                        "date": datetime.date.today().isoformat(),
                    })  # fmt: skip
                total += sum(launch.seconds(gpu) for launch in launches)
                moved += sum(launch.read + launch.written for launch in launches)
                least += bound.seconds(gpu)
                needed += bound.read + bound.written
                count += len(launches)
            cells = (str(tokens), str(count), f"{total * 1e6:.1f}", f"{least * 1e6:.1f}", f"{moved / needed:.2f}")
            table.add_row(name, *cells)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    console.print(table)
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
