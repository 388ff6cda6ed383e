"""The whole model, end to end, against every peer: `python benchmarks/bench_model.py [--quick|--tiny]`.

Every row of the CSV is one peer in one cell (batch, length). Peers are built once and checked against PyTorch eager;
then they take turns, with an sgemm between them, so that a machine that drifts drifts for all. L is the time that the
model's floating-point operations take at the rate of the sgemms of the same cell. "cold" is a call after those of all
other peers, whose weights have driven its own out of the caches; "hot" the call after that.
"""

from __future__ import annotations

import csv
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import machine
import torch
import transformers
from peers import PEERS, Missing, Peer, Runner
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from packedbert import bench

RESULTS = Path(__file__).parent / "results"
CELLS = ((1, 32), (1, 128), (1, 384), (8, 128), (8, 384), (32, 128))
QUICK_CELLS = ((1, 32), (1, 128), (8, 128))
TINY_CELLS = ((1, 8), (2, 16))

#: Peers that run the dense model too in a quick run: the seed's own measure is against eager PyTorch.
QUICK_DENSE = ("packedbert", "PyTorch eager")

#: Seconds that a peer is timed for in a cell, and the fewest and most calls.
BUDGET, LEAST, MOST = 3.0, 3, 40

#: Largest difference from PyTorch eager that a peer's logits may have, as a multiple of their spread.
TOLERANCE = {"fp32": 1e-4, "int8": 0.5}

console = Console(stderr=True)


def batches(batch: int, length: int, vocab_size: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Different ids for each call; no padding."""
    low = min(1000, vocab_size // 2)
    mask = torch.ones(batch, length, dtype=torch.long)
    return [(torch.randint(low, vocab_size, (batch, length)), mask) for _ in range(count)]


def build(model: nn.Module, peers: Sequence[Peer]) -> dict[Peer, Runner]:
    """All peers that can run the model here; the others are named."""
    runners = {}
    for peer in track(peers, "building the peers", console=console, transient=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runners[peer] = peer.build(model)
        except Missing as reason:
            console.print(f"skipped {peer.name} ({peer.precision}): {reason}")
    return runners


def check(runners: dict[Peer, Runner], expected: Tensor, data: tuple[Tensor, Tensor]) -> None:
    """Every peer has to give the answers before its time counts.

    Raises:
        SystemExit: one doesn't.
    """
    for peer, run in runners.items():
        error = (run(*data) - expected).abs().max().item() / expected.std().item()
        if not error <= TOLERANCE[peer.precision]:
            raise SystemExit(
                f"{peer.name} ({peer.precision}) is wrong: its logits are off by {error:.3g} of their spread"
            )


def measure(
    runners: dict[Peer, Runner], data: list[tuple[Tensor, Tensor]]
) -> tuple[dict[tuple[Peer, str], list[float]], float]:
    """Seconds of each peer, cold and hot, and the median sgemm rate between them."""

    def call(run: Runner, ahead: int) -> Callable[[int], object]:
        return lambda index: run(*data[(index + ahead) % len(data)])

    calls: dict[Any, Callable[[int], object]] = {"sgemm": machine.Sgemm()}
    for peer, run in runners.items():
        calls[peer, "cold"], calls[peer, "hot"] = call(run, 0), call(run, 1)
    trial = bench.interleaved(calls, 1, warmup=1)
    rounds = max(LEAST, min(MOST, int(BUDGET / max(seconds for (seconds,) in trial.values()))))
    times: dict[Any, list[float]] = bench.interleaved(calls, rounds, warmup=0)
    return times, machine.Sgemm.FLOPS / statistics.median(times.pop("sgemm"))


def rows(
    structure: bench.Structure, model_kind: str, runners: dict[Peer, Runner], cells: tuple[tuple[int, int], ...]
) -> Iterator[dict[str, Any]]:
    """The CSV's rows for one model."""
    for batch, length in track(cells, f"{structure.name}, {model_kind}", console=console, transient=True):
        data = batches(batch, length, structure.vocab_size)
        eager = next(run for peer, run in runners.items() if peer.name == "PyTorch eager")
        check(runners, eager(*data[0]), data[0])
        times, rate = measure(runners, data)
        flops = structure.flops(batch, length)
        for (peer, cache), seconds in times.items():
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
            yield {
                "structure": structure.name,
                "model": model_kind,
                "peer": peer.name,
                "precision": peer.precision,
                "batch": batch,
                "length": length,
                "cache": cache,
                "calls": len(seconds),
                "median_ms": round(1e3 * median, 4),
                "quartile_1_ms": round(1e3 * low, 4),
                "quartile_3_ms": round(1e3 * high, 4),
                "gflop": round(flops / 1e9, 4),
                "sgemm_gflops": round(rate / 1e9, 1),
                "time_over_L": round(median * rate / flops, 4),
            }


@click.command()
@click.option("--quick", is_flag=True, help="Fewer cells, fp32 peers only: about two minutes.")
@click.option("--tiny", is_flag=True, help="A toy structure: seconds; checks that the benchmark still runs.")
@click.option("--dense/--no-dense", default=True, show_default=True, help="Also the unpruned BERT-base.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of every peer.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV to write; default: benchmarks/results/model.csv.")
def main(quick: bool, tiny: bool, dense: bool, threads: int, out: Path | None) -> None:
    """Time packedbert and its peers on the seed's structure."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    structure = bench.STRUCTURES["tiny"] if tiny else bench.SEED
    cells = TINY_CELLS if tiny else QUICK_CELLS if quick else CELLS
    peers = tuple(peer for peer in PEERS if peer.precision == "fp32") if quick or tiny else PEERS
    about = machine.describe(threads)
    about |= {"fma_gflops": "", "copy_gb_s": f"{machine.bandwidth() / 1e9:.1f}"}
    if about["isa"] in ("avx2", "avx512") and (peak := machine.fma_peak(about["isa"], threads)):
        about["fma_gflops"] = f"{peak / 1e9:.1f}"

    models = [("packed", structure, peers)]
    if dense:
        # int8 on the dense model would double the time, and answer nothing that is asked here.
        rivals = [peer for peer in peers if peer.precision == "fp32"]
        models.append(
            ("dense", structure.unpruned(), [p for p in rivals if p.name in QUICK_DENSE] if quick else rivals)
        )
    out = out or RESULTS / "model.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = None
        for kind, shape, candidates in models:
            runners = build(bench.build_stock(shape), candidates)
            for row in rows(shape, kind, runners, cells):
                writer = writer or csv.DictWriter(file, [*row, *about])
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow({**row, **about})
                file.flush()  # an interrupted run keeps what it has
                click.echo(
                    f"{kind:7}{row['peer']:17}{row['precision']:6}({row['batch']},{row['length']}) {row['cache']:5}"
                    f"{row['median_ms']:10.2f} ms {row['time_over_L']:7.3f} L"
                )
            del runners
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
