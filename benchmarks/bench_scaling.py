"""How the time follows the work: `python benchmarks/bench_scaling.py [--tiny]`.

Time against batch, length, padding, density and structure, each series interleaved. Cost should follow the
floating-point operations of the real tokens: `ms_per_gflop` is what to compare within a series.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import peers
import record
import shapes
import torch
from machine import WARM, Machine
from peers import Runner
from torch import Tensor

from packedbert import bench
from packedbert.bench import Structure

#: Seconds that each point is timed for, and the fewest and most calls.
BUDGET, LEAST, MOST = 1.0, 3, 7

#: A call of so many seconds has its caches filled at the very beginning: it needs none before it that don't count.
LONG = 0.2

OURS, EAGER, DENSE = "packedbert", "PyTorch eager", "PyTorch eager, dense"


def padded(structure: Structure, lengths: Sequence[int], to: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of sequences that are padded on the right."""
    ids = torch.randint(structure.vocab_size // 2, (len(lengths), to))
    mask = (torch.arange(to)[None] < torch.tensor(lengths)[:, None]).long()
    return ids, mask


def series(
    name: str, structure: Structure, points: Sequence[tuple[str, Runner, Sequence[int], int]]
) -> Iterator[dict[str, Any]]:
    """Time points in turns: each a peer, its runner, the lengths of its sequences and what they are padded to.

    Each call that counts comes after some that don't, unless it is LONG: the other points have filled the caches.
    """
    data = [padded(structure, lengths, to) for _, _, lengths, to in points]
    once = {i: lambda _, i=i: points[i][1](*data[i]) for i in range(len(points))}
    typical = {i: seconds for i, (seconds,) in bench.interleaved(once, 1, warmup=1).items()}
    calls: dict[Any, Callable[[int], object]] = {}
    for i, call in once.items():
        if typical[i] < LONG:
            calls["warm", i] = bench.repeated(call, WARM)
        calls["counts", i] = call
    times = bench.interleaved(calls, max(LEAST, min(MOST, int(BUDGET / max(typical.values())))), warmup=0)
    for index, (peer, _, lengths, to) in enumerate(points):
        seconds = times["counts", index]
        shape = structure.unpruned() if peer == DENSE else structure
        gflop = sum(shape.flops(1, length) for length in lengths) / 1e9
        yield {
            "series": name,
            "structure": structure.name,
            "peer": peer,
            "batch": len(lengths),
            "length": to,
            "tokens": sum(lengths),
            **record.summary(seconds),
            "gflop": round(gflop, 4),
            "ms_per_gflop": round(1e3 * statistics.median(seconds) / gflop, 4),
        }


def contestants(structure: Structure) -> dict[str, Runner]:
    """The packed model in packedbert and in stock modules, and the dense one."""
    stock, dense = bench.build_stock(structure), bench.build_stock(structure.unpruned())
    return {OURS: peers.ours(stock), EAGER: peers.eager(stock), DENSE: peers.eager(dense)}


def rows(tiny: bool) -> Iterator[dict[str, Any]]:
    """All series."""
    seed = bench.STRUCTURES["tiny"] if tiny else bench.SEED
    scale = 16 if tiny else 1
    runners = contestants(seed)
    ours = runners[OURS]
    length = 128 // scale
    yield from series("batch", seed, [(OURS, ours, [length] * batch, length) for batch in shapes.SCALING_BATCHES])
    lengths = [max(1, length // scale) for length in shapes.SCALING_LENGTHS]
    yield from series("length", seed, [(OURS, ours, [length], length) for length in lengths])

    real, to = [length // scale for length in shapes.SQUAD_LENGTHS], shapes.PADDED_LENGTH // scale
    mean = round(sum(real) / len(real))
    points = [(peer, run, real, to) for peer, run in runners.items()]
    # What the real tokens cost without any padding: as many sequences of the mean length.
    points.append((OURS, ours, [mean] * len(real), mean))
    yield from series("padded", seed, points)
    fills = [[max(1, to * quarter // 4)] * len(real) for quarter in range(1, 5)]
    yield from series("fill", seed, [(peer, runners[peer], fill, to) for fill in fills for peer in (OURS, EAGER)])

    batch, length = (2, 8) if tiny else shapes.STRUCTURE_CELL
    groups = {"structure": shapes.published(), "density": [shapes.of_density(density) for density in shapes.DENSITIES]}
    for name, structures in ({"structure": [seed]} if tiny else groups).items():
        for structure in structures:
            # The dense model is the same for every density, and the last of them.
            left_out = DENSE if name == "density" else ""
            runners = contestants(structure)
            points = [(peer, run, [length] * batch, length) for peer, run in runners.items() if peer != left_out]
            yield from series(name, structure, points)


@click.command()
@click.option("--tiny", is_flag=True, help="A toy structure: seconds; checks that the benchmark still runs.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of every model.")
@click.option("--out", type=click.Path(path_type=Path), default=record.RESULTS / "scaling.csv", show_default=True)
def main(tiny: bool, threads: int, out: Path) -> None:
    """Time against batch, length, padding, structure and density."""
    torch.manual_seed(0)
    record.write(out, rows(tiny), Machine.measure(threads))


if __name__ == "__main__":
    main()
