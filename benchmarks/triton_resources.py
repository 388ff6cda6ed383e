"""What Triton makes of its kernels ahead of time, without a GPU: `python benchmarks/triton_resources.py [--check]`.

Every kernel, tile and dtype is compiled for NVIDIA's sm_80 to sm_120 and AMD's gfx90a and gfx942, for sizes that are
multiples of 16 and for odd ones, which pruning makes. One row each: registers, shared memory, spills, and the matrix
instructions in the code (HMMA, HGMMA, UTCHMMA; MFMA on AMD). Counted, not measured.
`--check` writes nothing and fails on a spill, and where half precision has no matrix instruction.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: this is about compiled kernels
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as up to 3.9; unset, each compilation warns

import click
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from packedbert import triton_kernels as kernels

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")},
}
DTYPES = ("fp16", "bf16", "fp32")
SIZES = ("x16", "odd")  # loads of odd rows are narrower, and take more registers
MATRIX = {"cuda": r"HMMA|HGMMA|UTCHMMA|UTCQMMA", "hip": r"v_mfma"}
console = Console(stderr=True)


class Build(NamedTuple):
    """One compilation."""

    kernel: str
    variant: str
    sizes: str
    dtype: str
    target: str
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def builds(targets: tuple[str, ...], dtypes: tuple[str, ...]) -> Iterator[Build]:
    """Each kernel as the launches in triton_kernels.py compile it."""
    for target, dtype, size in itertools.product(targets, dtypes, SIZES):
        value, index = f"*{dtype}", "*i32"
        pointers = dict.fromkeys(("x_ptr", "w_ptr", "b_ptr", "r_ptr", "y_ptr"), value)
        sizes = dict.fromkeys(("rows", "N", "K", "x_pitch", "r_pitch", "y_pitch"), "i32")
        signature = {**pointers, "rows_used_ptr": index, **sizes}
        for tile in kernels.linear_tiles(dtype == "fp32"):
            constants = {"ACTIVATION": "gelu", "RESIDUAL": True, "BOUNDED": True}
            constants |= {name: getattr(tile, name) for name in ("BM", "BN", "BK")}
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            variant = f"{tile.BM}x{tile.BN}x{tile.BK}"
            yield Build("_linear_kernel", variant, size, dtype, target, signature, constants, options)
        names = ("x_ptr", "w_ptr", "b_ptr", "y_ptr")
        signature = {**dict.fromkeys(names, value), "rows_used_ptr": index, "rows": "i32", "N": "i32"}
        signature |= {"x_pitch": "i32", "y_pitch": "i32", "eps": "fp32"}
        constants = {"LAYER_NORM": True, "BOUNDED": True, "BN": 1024}
        yield Build("_norm_kernel", "1024", size, dtype, target, signature, constants, {"num_warps": 4})
        signature = {"qkv_ptr": value, "o_ptr": value, "cu_seqlens_ptr": index}
        signature |= {**dict.fromkeys(("pitch", "o_pitch", "heads", "D"), "i32"), "scale": "fp32"}
        for head in (32, 64, 128):
            queries, keys = kernels.attention_tile(dtype == "fp32", head)
            constants = {"BD": head, "BM": queries, "BN": keys}
            options = {"num_warps": 4, "num_stages": 2}
            yield Build("_attention_kernel", f"head {head}", size, dtype, target, signature, constants, options)


def compile_one(build: Build) -> dict[str, Any]:
    """Compile, and count."""
    function = getattr(kernels, build.kernel)
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={**build.signature, **dict.fromkeys(build.constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        # As a launch tells Triton: arrays are aligned, and row pitches and sizes may be multiples of 16.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in build.signature.items()
            if kind[0] == "*" or (build.sizes == "x16" and (name.endswith("pitch") or name in ("N", "K", "D")))
        },
    )
    target = TARGETS[build.target]
    compiled = triton.compile(source, target=target, options=build.options)
    if target.backend == "cuda":
        registers, spilled, code = _of_cubin(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])
    return {
        "kernel": build.kernel,
        "variant": build.variant,
        "sizes": build.sizes,
        "dtype": build.dtype,
        "target": build.target,
        "registers": registers,
        "spilled": spilled,
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "matrix_instructions": len(re.findall(MATRIX[target.backend], code)),
        "triton": triton.__version__,
    }


def _of_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack and local memory, and the disassembly."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([cuobjdump, flag, file], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return int(found[1]), int(found[2]) + int(found[3]), code


def faults(row: dict[str, Any]) -> str:
    """What is wrong with a kernel; empty: nothing."""
    name = " ".join(str(row[key]) for key in ("kernel", "variant", "sizes", "dtype", "target"))
    if row["spilled"]:
        return f"{name}: spills ({row['spilled']})"
    if row["kernel"] != "_norm_kernel" and row["dtype"] != "fp32" and not row["matrix_instructions"]:
        return f"{name}: no matrix instruction"
    return ""


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 on a spill or a missing matrix instruction.")
@click.option("--target", "targets", type=click.Choice(list(TARGETS)), multiple=True, help="Only this; repeatable.")
@click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True, help="Only this; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "triton_resources.csv", show_default=True)
def main(check: bool, targets: tuple[str, ...], dtypes: tuple[str, ...], out: Path) -> None:
    """Compile the Triton kernels for GPUs that needn't be here, and tabulate what they take."""
    todo = list(builds(targets or tuple(TARGETS), dtypes or DTYPES))
    with ProcessPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        rows = list(track(pool.map(compile_one, todo), "compiling", len(todo), console=console, transient=True))
    wrong = [text for text in map(faults, rows) if text]
    if not check:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)
    for text in wrong:
        console.print(text, style="red")
    click.echo(f"{len(rows)} kernels compiled, {len(wrong)} of them are wrong" + ("" if check else f"; written: {out}"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
