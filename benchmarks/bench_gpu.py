"""Ops and whole model on a GPU against PyTorch's own: `python benchmarks/bench_gpu.py`, minutes.

Every row of the CSV is one peer in one case, timed by CUDA events in turns with the others, after a check of what it
computes. Ops: packed_linear against F.linear with its epilogue in separate kernels (cuBLASLt), pruned_attention
against scaled_dot_product_attention; each is recorded REPEATS times in a CUDA graph, so that what is timed is the
GPU's part. Model: the seed packed and dense, called as it is ("eager"), recorded in a graph, and by torch.compile. The
share of the peak is that of half-precision products which cuBLAS reaches here in the same run.
"""

from __future__ import annotations

import copy
import csv
import datetime
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
import transformers
from record import RESULTS, console
from shapes import CELLS

import packedbert
from packedbert import bench, ops, triton_kernels

ROUNDS = 30
REPEATS = 20

#: Of the largest number of a result: how far two ways to compute it in half precision may be apart.
OP_TOLERANCE, MODEL_TOLERANCE = 0.01, 0.02

#: (tokens, out_features, in_features): qkv, out-projection, up and down of the seed's layers 4 and 10.
PRODUCTS = tuple(
    (tokens, *sizes)
    for tokens in (32, 128, 1024, 4096)
    for sizes in ((1344, 768), (768, 448), (833, 768), (768, 833), (96, 768), (768, 96))
)

Calls = dict[str, Callable[[], torch.Tensor]]


def milliseconds(calls: Calls) -> dict[str, list[float]]:
    """Of each call, ROUNDS times, in turns."""
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def recorded(call: Callable[[], torch.Tensor], repeats: int = 1) -> Callable[[], torch.Tensor]:
    """The call, so many times in a row, as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is allocated and chosen once must be, before a graph is recorded
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            result = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def rows_of(
    case: str, calls: Calls, flop: float, peak: float, tolerance: float, repeats: int = 1
) -> Iterator[dict[str, Any]]:
    """Check each call against the first, then time all. A call does its work `repeats` times.

    Raises:
        SystemExit: ours is wrong.
    """
    expected = next(iter(calls.values()))().float().clone()
    for name, call in list(calls.items()):
        error = (call().float() - expected).abs().max().item() / expected.abs().max().item()
        if not error <= tolerance:
            if name.startswith("packedbert"):
                raise SystemExit(f"{case}: {name} is wrong: off by {error:.3g} of the largest number")
            console.print(f"{case}: left out {name}, which is off by {error:.3g} of the largest number")
            del calls[name]
    for name, all_times in milliseconds(calls).items():
        times = [time / repeats for time in all_times]
        median = statistics.median(times)
        yield {
            "case": case,
            "peer": name,
            "median_ms": round(median, 4),
            "quartile_1_ms": round(statistics.quantiles(times, n=4)[0], 4),
            "quartile_3_ms": round(statistics.quantiles(times, n=4)[2], 4),
            "gflop": round(flop / 1e9, 4),
            "percent_of_peak": round(100 * flop / (median * 1e-3) / peak, 1),
        }


def op_rows(case: str, calls: Calls, flop: float, peak: float) -> Iterator[dict[str, Any]]:
    """`rows_of` graphs of REPEATS calls."""
    graphs = {name: recorded(call, REPEATS) for name, call in calls.items()}
    return rows_of(case, graphs, flop, peak, OP_TOLERANCE, REPEATS)


def measured_peak(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of cuBLAS at a size that nothing else limits."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    times = milliseconds({"gemm": lambda: a @ b})["gemm"]
    return 2 * size**3 / (statistics.median(times) * 1e-3)


def every_op(dtype: torch.dtype, peak: float) -> Iterator[dict[str, Any]]:
    """Products with their epilogues, and attention."""
    for tokens, out_features, in_features in PRODUCTS:
        x, w, b, r, g = (
            torch.randn(shape, device="cuda", dtype=dtype)
            for shape in (
                *((tokens, in_features), (out_features, in_features), (out_features,)),
                *((tokens, out_features), (out_features,)),
            )
        )
        w /= in_features**0.5
        packed = ops.prepack_linear(w)
        triton = triton_kernels.packed_linear
        flop = 2 * tokens * out_features * in_features
        size = f"{tokens}x{in_features}x{out_features}"
        gelu: Calls = {
            "PyTorch": lambda x=x, w=w, b=b: F.gelu(F.linear(x, w, b)),
            "packedbert": lambda x=x, packed=packed, b=b: ops.packed_linear(x, packed, b, "gelu"),
            "packedbert, Triton": lambda x=x, w=w, b=b, triton=triton: triton(x, w, b, "gelu"),
        }
        yield from op_rows(f"linear, gelu {size}", gelu, flop, peak)
        norm: Calls = {
            "PyTorch": lambda x=x, w=w, b=b, r=r, g=g: F.layer_norm(F.linear(x, w, b) + r, g.shape, g, g, 1e-12),
            "packedbert": lambda x=x, packed=packed, b=b, r=r, g=g: ops.packed_linear(
                x, packed, b, "none", r, "layer_norm", g, g
            ),
            "packedbert, Triton": lambda x=x, w=w, b=b, r=r, g=g, triton=triton: triton(
                x, w, b, "none", r, "layer_norm", g, g
            ),
        }
        yield from op_rows(f"linear, residual, norm {size}", norm, flop, peak)
    for (batch, length), heads in [(cell, heads) for cell in CELLS for heads in (3, 7)]:
        qkv = torch.randn(batch * length, 3 * heads * 64, device="cuda", dtype=dtype)
        bounds = torch.arange(0, (batch + 1) * length, length, device="cuda", dtype=torch.int32)

        def stock(qkv=qkv, batch=batch, length=length, heads=heads) -> torch.Tensor:
            q, k, v = qkv.view(batch, length, 3, heads, 64).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch * length, heads * 64)

        calls: Calls = {
            "PyTorch SDPA": stock,
            "packedbert": lambda qkv=qkv, bounds=bounds, heads=heads: ops.pruned_attention(qkv, bounds, heads),
            "packedbert, Triton": lambda qkv=qkv, bounds=bounds, heads=heads, length=length: (
                triton_kernels.pruned_attention(qkv, bounds, heads, length)
            ),
        }
        flop = 4 * batch * length**2 * heads * 64
        yield from op_rows(f"attention {batch}x{length}, {heads} heads", calls, flop, peak)


@torch.inference_mode()
def every_model(dtype: torch.dtype, peak: float, compiled: bool) -> Iterator[dict[str, Any]]:
    """The seed, packed and dense, in every cell; then, if `compiled`, by torch.compile, which takes minutes."""
    stock = bench.build_stock(bench.SEED).to("cuda", dtype)
    dense = bench.build_stock(bench.SEED.unpruned()).to("cuda", dtype)
    models = {
        "PyTorch": stock,
        "packedbert": packedbert.patch_model(copy.deepcopy(stock), backend="cuda"),
        "packedbert, Triton": packedbert.patch_model(copy.deepcopy(stock), backend="triton"),
    }

    def calls_of(models: dict[str, Any], batch: int, length: int) -> Calls:
        ids = torch.randint(1000, bench.SEED.vocab_size, (batch, length), device="cuda")
        return {name: lambda model=model: model(input_ids=ids).start_logits for name, model in models.items()}

    def eager_and_recorded(calls: Calls) -> Calls:
        both = {f"{name}, eager": call for name, call in calls.items()}
        for name, call in calls.items():
            try:
                both[f"{name}, CUDA graph"] = recorded(call)
            except RuntimeError as error:  # a model may wait for the GPU, which no graph can hold
                console.print(f"left out {name}, CUDA graph: {error}")
        return both

    for batch, length in CELLS:
        case = f"model {batch}x{length}"
        calls = eager_and_recorded(calls_of(models, batch, length))
        yield from rows_of(case, calls, bench.SEED.flops(batch, length), peak, MODEL_TOLERANCE)
        calls = eager_and_recorded(calls_of({"PyTorch, dense": dense}, batch, length))
        yield from rows_of(case, calls, bench.SEED.unpruned().flops(batch, length), peak, MODEL_TOLERANCE)
    if not compiled:
        return
    for batch, length in CELLS:
        torch.compiler.reset()
        named = {
            f"{name}, torch.compile": torch.compile(models[name], mode="reduce-overhead", dynamic=False)
            for name in ("PyTorch", "packedbert")
        }
        calls = calls_of(named, batch, length)
        yield from rows_of(f"model {batch}x{length}", calls, bench.SEED.flops(batch, length), peak, MODEL_TOLERANCE)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "gpu.csv", show_default=True)
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="torch.compile too: minutes.")
def main(out: Path, dtype: str, compiled: bool) -> None:
    """Time the CUDA kernels, single and in the seed's model, against PyTorch."""
    cuda = next(backend for backend in packedbert.backends() if backend.name == "cuda")
    if not cuda.usable:
        raise click.ClickException(f"expected a GPU that the cuda backend can use, got none: {cuda.detail}")
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    peak = measured_peak(torch_dtype)
    about = {
        "dtype": dtype, "gpu": torch.cuda.get_device_name(), "peak_tflops": round(peak / 1e12, 1),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = None
        for rows in (every_op(torch_dtype, peak), every_model(torch_dtype, peak, compiled)):
            for row in rows:
                if writer is None:
                    writer = csv.DictWriter(file, [*row, *about])
                    writer.writeheader()
                writer.writerow({**row, **about})
                file.flush()
                click.echo("  ".join(map(str, row.values())))
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
