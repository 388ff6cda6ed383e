"""The whole model, end to end, against every peer: `python benchmarks/bench_model.py [--quick|--tiny]`.

Every row of the CSV is one peer in one cell (batch, length). Peers are built once and checked against PyTorch eager;
then they take turns, with an sgemm between them, so that a machine that drifts drifts for all. L is the time that the
model's floating-point operations take at the rate of the sgemms of the same cell.

Each turn is two timed calls. "cold" comes after those of all other peers, whose weights have driven its own out of the
caches. Before it, torch's threads do small products for SETTLE seconds: ONNX Runtime's threads keep a core busy for 10
to 50 ms after they are done, and a processor that rests wakes slowly (after 50 ms of sleep a call of 2 ms took 5, and
the next one 2.9). "hot" comes after calls of machine.WARM seconds: one, where it takes that long.

Beside the peers stand floors.py's: model "floor", which no peer can be faster than.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import floors
import machine
import record
import shapes
import torch
import transformers
from peers import PEERS, Missing, Peer, Runner
from rich.progress import track
from shapes import Cell
from torch import Tensor, nn

from packedbert import bench

#: Peers that run the dense model in every cell: the seed's own measure is against eager PyTorch. The others run it in
#: the quick cells, and not at all in a quick run.
DENSE_EVERYWHERE = ("packedbert", "PyTorch eager")

#: Seconds that a peer is timed for in a cell, and the fewest and most turns.
BUDGET, LEAST, MOST = 1.5, 3, 9

#: Seconds of small products between one peer's calls and the next one's.
SETTLE = 0.05

#: Largest difference from PyTorch eager that a peer's logits may have, as a multiple of their spread.
TOLERANCE = {"fp32": 1e-4, "int8": 0.5}


def batches(batch: int, length: int, vocab_size: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Different ids for each call; no padding."""
    low = min(1000, vocab_size // 2)
    mask = torch.ones(batch, length, dtype=torch.long)
    return [(torch.randint(low, vocab_size, (batch, length)), mask) for _ in range(count)]


def build(model: nn.Module, peers: Sequence[Peer]) -> dict[Peer, Runner]:
    """All peers that can run the model here; the others are named."""
    runners = {}
    for peer in track(peers, "building the peers", console=record.console, transient=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runners[peer] = peer.build(model)
        except Missing as reason:
            record.console.print(f"skipped {peer.name} ({peer.precision}): {reason}")
    return runners


def check(
    runners: dict[Peer, Runner], expected: Tensor, data: tuple[Tensor, Tensor]
) -> tuple[dict[Peer, float], float]:
    """Every peer has to give the answers before its time counts; one that doesn't is named and left out.

    Returns: the largest difference of the logits from eager PyTorch's, in units of their spread, of those that do;
    and the seconds that the slowest of them took.

    Raises:
        SystemExit: packedbert doesn't.
    """
    errors, slowest = {}, 0.0
    for peer, run in runners.items():
        logits = torch.stack([*run(*data)])
        start = time.perf_counter()
        run(*data)  # the first call may have compiled something for this shape
        seconds = time.perf_counter() - start
        error = (logits - expected).abs().max().item() / expected.std().item()
        if error <= TOLERANCE[peer.precision]:
            errors[peer], slowest = error, max(slowest, seconds)
            continue
        wrong = f"{peer.name} ({peer.precision}) is wrong: its logits are off by {error:.3g} of their spread"
        if peer.ours:
            raise SystemExit(wrong)
        record.console.print(f"left out at {tuple(data[0].shape)}: {wrong}")
    return errors, slowest


def measure(
    runners: dict[Peer, Runner], data: list[tuple[Tensor, Tensor]], slowest: float
) -> tuple[dict[tuple[Peer, str], list[float]], float]:
    """Seconds of each peer, cold and hot, and the median sgemm rate between them; `slowest` is a call's, about."""

    def call(run: Runner, ahead: int) -> Callable[[int], object]:
        return lambda index: run(*data[(index + ahead) % len(data)])

    small = torch.randn(256, 256)
    settle = bench.repeated(lambda _: small @ small, SETTLE)
    calls: dict[Any, Callable[[int], object]] = {"sgemm": machine.Sgemm()}
    for peer, run in runners.items():
        calls["settle", peer] = settle
        calls[peer, "cold"] = call(run, 0)
        calls["warm", peer] = bench.repeated(call(run, 1), machine.WARM)
        calls[peer, "hot"] = call(run, 2)
    rounds = max(LEAST, min(MOST, int(BUDGET / slowest)))
    times: dict[Any, list[float]] = bench.interleaved(calls, rounds, warmup=0)
    rate = machine.Sgemm.FLOPS / statistics.median(times.pop("sgemm"))
    return {key: seconds for key, seconds in times.items() if key[0] not in ("settle", "warm")}, rate


def rows(
    structure: bench.Structure,
    model_kind: str,
    runners: dict[Peer, Runner],
    cells: Sequence[Cell],
    beside: dict[Peer, Runner] | None = None,
) -> Iterator[dict[str, Any]]:
    """The CSV's rows for one model, and the floors `beside` it."""
    beside = beside or {}
    for batch, length in cells:
        data = batches(batch, length, structure.vocab_size)
        eager = next(run for peer, run in runners.items() if peer.name == "PyTorch eager")
        errors, slowest = check(runners, torch.stack([*eager(*data[0])]), data[0])
        times, rate = measure({**{peer: runners[peer] for peer in errors}, **beside}, data, slowest)
        flops = structure.flops(batch, length)
        for (peer, cache), seconds in times.items():
            yield {
                "structure": structure.name,
                "model": "floor" if peer in beside else model_kind,
                "peer": peer.name,
                "precision": peer.precision,
                "batch": batch,
                "length": length,
                "cache": cache,
                **record.summary(seconds),
                "gflop": round(flops / 1e9, 4),
                "sgemm_gflops": round(rate / 1e9, 1),
                "time_over_L": round(statistics.median(seconds) * rate / flops, 4),
                "logits_error": float(f"{errors[peer]:.2g}") if peer in errors else "",
            }


def every_row(structure: bench.Structure, cells: Sequence[Cell], quick: bool, dense: bool) -> Iterator[dict[str, Any]]:
    """The packed model with all peers, then the dense one."""
    fp32 = [peer for peer in PEERS if peer.precision == "fp32"]
    most = [peer for peer in PEERS if peer.precision == "fp32" or peer.ours]
    stock = bench.build_stock(structure)
    yield from rows(structure, "packed", build(stock, most if quick else PEERS), cells, floors.build(stock))
    if not dense:
        return
    everywhere = [peer for peer in fp32 if peer.name in DENSE_EVERYWHERE]
    some = everywhere if quick else fp32  # int8 on the dense model answers nothing that is asked here
    unpruned = structure.unpruned()
    runners = build(bench.build_stock(unpruned), some)
    few = [cell for cell in cells if cell in shapes.QUICK_CELLS or quick]
    yield from rows(unpruned, "dense", runners, few)
    left = [cell for cell in cells if cell not in few]
    yield from rows(unpruned, "dense", {peer: runners[peer] for peer in everywhere}, left)


@click.command()
@click.option("--quick", is_flag=True, help="Fewer cells, no int8 peers: a few minutes.")
@click.option("--tiny", is_flag=True, help="A toy structure: seconds; checks that the benchmark still runs.")
@click.option("--dense/--no-dense", default=True, show_default=True, help="Also the unpruned BERT-base.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of every peer.")
@click.option("--out", type=click.Path(path_type=Path), default=record.RESULTS / "model.csv", show_default=True)
def main(quick: bool, tiny: bool, dense: bool, threads: int, out: Path) -> None:
    """Time packedbert and its peers on the seed's structure."""
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    about = machine.Machine.measure(threads)
    structure = bench.STRUCTURES["tiny"] if tiny else bench.SEED
    cells = shapes.TINY_CELLS if tiny else shapes.QUICK_CELLS if quick else shapes.CELLS
    record.write(out, every_row(structure, cells, quick or tiny, dense), about)


if __name__ == "__main__":
    main()
