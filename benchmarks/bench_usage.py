"""What using packedbert costs besides time per call: `python benchmarks/bench_usage.py [--tiny]`.

Import, patching, memory, a busy machine, a forced instruction set, and whether the bits stay the same. Each row has the
limit that it is held to, and whether it was met.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import click
import machine
import peers
import record
import torch

import packedbert
from packedbert import bench, dispatch
from packedbert.bench import Structure

MIB = 2**20

#: Forwards before memory is called steady, and after them.
WARM_UP, STEADY = 500, 2000


def row(what: str, value: float, unit: str, limit: float | None) -> dict[str, Any]:
    """One finding; a value up to the limit is good. Without a limit it is something to compare another one with."""
    return {
        "what": what,
        "value": round(value, 4),
        "unit": unit,
        "limit": "" if limit is None else round(limit, 4),
        "met": "" if limit is None else "yes" if value <= limit else "no",
    }


def import_seconds() -> float:
    """What `import packedbert` adds to importing a BERT class of transformers: the median of several processes."""
    code = (
        "import time, transformers; from transformers import BertForQuestionAnswering; start = time.perf_counter(); "
        "import packedbert; print(time.perf_counter() - start)"
    )
    return statistics.median(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(5)
    )


def patch_seconds(structure: Structure) -> float:
    """patch_model on the seed as nn_pruning stores it, with full-width FFNs."""
    seconds = []
    for _ in range(3):
        model = bench.build_stock(structure, stored=True)
        start = time.perf_counter()
        packedbert.patch_model(model)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory of this process, now or (VmHWM) at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_bytes(ours: bool, structure: Structure, cell: tuple[int, int]) -> tuple[int, int]:
    """Most memory while a model runs, in a process of its own; and the bytes of prepacked weights in it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (ours, structure, cell, torch.get_num_threads()))


def _peak_bytes(ours: bool, structure: Structure, cell: tuple[int, int], threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    model: Any = bench.build_stock(structure)
    prepacked = 0
    if ours:
        packedbert.patch_model(model, keep_original=False)
        prepacked = sum(weight.nbytes for weight in model.bert.encoder.weights() if weight.dim() == 2)
    run, batch = peers.torch_runner(model), bench.random_batch(structure, *cell)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    for _ in range(3):
        run(**batch)
    return resident("VmHWM"), prepacked


def growth_bytes(run: Any, structure: Structure, steady: int) -> int:
    """What memory grows by in many forwards of mixed lengths, padded and not."""
    longest = structure.max_length

    def forward(index: int) -> None:
        length = 1 + index * 37 % (longest if index % 8 == 0 else min(64, longest))
        run(**bench.random_batch(structure, 1 + index % 3, length, ragged=index % 2 == 1, seed=index))

    for index in range(WARM_UP if steady == STEADY else 5):
        forward(index)
    before = resident()
    for index in range(steady):
        forward(index)
    return resident() - before


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def beside_busy_process(runners: dict[str, Any], structure: Structure, cell: tuple[int, int], rounds: int) -> float:
    """Our time over packed eager's while a foreign process takes a core."""
    batch = bench.random_batch(structure, *cell)
    calls = {name: lambda _, run=run: run(**batch) for name, run in runners.items()}
    with busy_process():
        times = bench.interleaved(calls, rounds)
    return statistics.median(times["packedbert"]) / statistics.median(times["PyTorch eager"])


def seconds_on(
    isa: str, run: Any, structure: Structure, cell: tuple[int, int], rounds: int, beside: Callable[[int], object]
) -> float:
    """Our time on a forced instruction set, in turns with `beside`."""
    native, batch = dispatch.NATIVE, bench.random_batch(structure, *cell)
    assert native is not None
    before = native.isa()
    native.set_isa(isa)
    try:
        return statistics.median(bench.interleaved({"run": lambda _: run(**batch), "beside": beside}, rounds)["run"])
    finally:
        native.set_isa(before)


def avx2_rows(ours: Any, structure: Structure, cell: tuple[int, int], rounds: int) -> Iterator[dict[str, Any]]:
    """Times over what the operations take at the FMA peak of AVX2, where that can be told.

    The peak is measured in turns with our calls: on a shared machine it moves by a tenth within minutes.
    """
    if dispatch.NATIVE is None or "avx2" not in dispatch.NATIVE.available_isas():
        return
    peaks: list[float] = []
    with machine.peak_program("avx2", torch.get_num_threads()) as measure:
        if measure is None:
            return
        seconds = seconds_on("avx2", ours, structure, cell, rounds, lambda _: peaks.append(measure().fma))
    peak = statistics.median(peaks)
    yield row("FMA peak of AVX2, on registers alone", peak / 1e9, "GFLOP/s", None)
    yield row(f"AVX2 forced at {cell}: time over its FMA limit", seconds * peak / structure.flops(*cell), "", 1.15)
    products = 2 * cell[0] * cell[1] * sum(inputs * outputs for inputs, outputs in linear_shapes(structure))
    yield row(
        "the same of PyTorch's sgemm forced to AVX2, the linear layers' products alone",
        product_seconds(structure, cell, rounds) * peak / products,
        "",
        None,
    )


def product_seconds(structure: Structure, cell: tuple[int, int], rounds: int) -> float:
    """The linear layers' products alone, of PyTorch's own sgemm on AVX2, in a process of its own.

    MKL_ENABLE_INSTRUCTIONS is read by Intel's MKL, which is PyTorch's sgemm on x86; elsewhere it changes nothing.
    """
    with (
        mock.patch.dict(os.environ, MKL_ENABLE_INSTRUCTIONS="AVX2", ATEN_CPU_CAPABILITY="avx2"),
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        return pool.apply(_product_seconds, (structure, cell, rounds, torch.get_num_threads()))


def _product_seconds(structure: Structure, cell: tuple[int, int], rounds: int, threads: int) -> float:
    torch.set_num_threads(threads)
    products = []
    for inputs, outputs in linear_shapes(structure):
        x, weight = torch.randn(cell[0] * cell[1], inputs), torch.randn(inputs, outputs)
        products.append((x, weight, x @ weight))

    def multiply(_: int) -> None:
        for x, weight, out in products:
            torch.mm(x, weight, out=out)

    return statistics.median(bench.interleaved({"products": multiply}, rounds)["products"])


def linear_shapes(structure: Structure) -> list[tuple[int, int]]:
    """Inputs and outputs of all matrices of an encoder."""
    hidden, shapes = structure.hidden_size, []
    for heads, width in zip(structure.heads, structure.ffn_widths, strict=True):
        inner = heads * hidden // structure.num_heads
        shapes += [(hidden, 3 * inner), (inner, hidden), (hidden, width), (width, hidden)]
    return shapes


def differing_calls(run: Any, structure: Structure, callers: int, calls: int = 6) -> int:
    """How many of the calls that several threads make at once have other bits than a call alone."""
    batches = [bench.random_batch(structure, 2, min(40, structure.max_length), ragged=True, seed=i) for i in range(3)]

    def call(batch: int) -> torch.Tensor:
        return torch.stack([*run(**batches[batch])])

    expected = [call(batch) for batch in range(3)]
    barrier = threading.Barrier(callers)

    def caller(first: int) -> int:
        barrier.wait()
        results = [(i % 3, call(i % 3)) for i in range(first, first + calls)]
        return sum(not torch.equal(result, expected[index]) for index, result in results)

    with ThreadPoolExecutor(callers) as pool:
        return sum(pool.map(caller, range(callers)))


def rows(tiny: bool) -> Iterator[dict[str, Any]]:
    """All findings."""
    structure = bench.STRUCTURES["tiny"] if tiny else bench.SEED
    cell = (2, 16) if tiny else (8, 128)
    rounds = 2 if tiny else 9
    yield row("import after transformers' BERT", import_seconds(), "s", 0.3)
    yield row("patch_model", patch_seconds(structure), "s", 1.5)
    stock = bench.build_stock(structure)
    runners = {"packedbert": peers.ours(stock), "PyTorch eager": peers.eager(stock)}
    ours = runners["packedbert"]
    if sys.platform == "linux":
        eager_peak, _ = peak_bytes(False, structure, cell)
        peak, prepacked = peak_bytes(True, structure, cell)
        name = f"peak memory at {cell}, packed eager + prepacked weights as the limit"
        yield row(name, peak / MIB, "MiB", (eager_peak + prepacked) / MIB)
        steady = 50 if tiny else STEADY
        yield row(f"memory growth over {steady} forwards", growth_bytes(ours, structure, steady) / MIB, "MiB", 8)
    busy = beside_busy_process(runners, structure, cell, rounds)
    yield row("time over packed eager beside a busy process", busy, "", 1.0)
    yield from avx2_rows(ours, structure, cell, rounds)
    for callers in (1, 2, 4):
        yield row(f"calls with other bits, {callers} callers", differing_calls(ours, structure, callers), "", 0)


@click.command()
@click.option("--tiny", is_flag=True, help="A toy structure: seconds; checks that the benchmark still runs.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of every model.")
@click.option("--out", type=click.Path(path_type=Path), default=record.RESULTS / "usage.csv", show_default=True)
def main(tiny: bool, threads: int, out: Path) -> None:
    """Measure import, patching, memory, a busy machine, and sameness of bits."""
    record.write(out, rows(tiny), machine.Machine.measure(threads))


if __name__ == "__main__":
    main()
