"""What a benchmark ran on, and what that machine can do at best: sgemm, float and int8 arithmetic, bandwidth."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

import packedbert
from packedbert import dispatch
from packedbert.bench import interleaved

#: Seconds of calls after which caches are warm. A processor with a large last level cache takes its time to fill it: on
#: one with 480 MB packedbert's calls at (1, 32) took 7.4, 6.3, 6.1, 6.1 ms, 5.6 after ten and 5.2 after twenty, in int8
#: 3.9, 3.1, 2.8, 2.5 and 2.0 after ten (OpenVINO's 14.8, 11.3, 11.0, 10.8, 10.7; by hand).
WARM = 0.1

PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "nncf")


def cpu_name() -> str:
    """The processor as the operating system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


class Peaks(NamedTuple):
    """Operations a second of all threads, on registers alone.

    Attributes:
        fma: FLOP/s of multiply-adds in float32.
        int8: op/s of int8 products in vectors.
        tile_float: FLOP/s of float32 products that AMX makes of bfloat16; 0 where the kernels don't use it.
        tile_int8: op/s of int8 products in AMX; 0 likewise.
    """

    fma: float
    int8: float
    tile_float: float = 0.0
    tile_int8: float = 0.0

    def best(self, precision: str) -> float:
        """Of what there is for "fp32" or "int8"."""
        return max(self.int8, self.tile_int8) if precision == "int8" else max(self.fma, self.tile_float)


@dataclass(frozen=True)
class Machine:
    """What the figures of a run were taken on.

    Attributes:
        names: processor, threads, instruction set, date, versions.
        peaks: None where there is no compiler.
        copy_bytes: bytes/s of a copy in memory, read and written.
    """

    names: dict[str, str]
    peaks: Peaks | None
    copy_bytes: float

    @classmethod
    def measure(cls, threads: int) -> Machine:
        """Look, and measure; torch uses so many threads from here on."""
        torch.set_num_threads(threads)
        names = {
            "date": date.today().isoformat(),
            "cpu": cpu_name(),
            "cores": str(os.cpu_count()),
            "threads": str(threads),
            "isa": dispatch.cpu_isa(),
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
            "packedbert": packedbert.__version__,
        }
        return cls(names, register_peaks(names["isa"], threads), bandwidth())

    def columns(self) -> dict[str, str]:
        """One column of a CSV each."""
        columns = ("fma_gflops", "int8_gops", "amx_fp32_gflops", "amx_int8_gops")
        peaks = [f"{peak / 1e9:.1f}" if peak else "" for peak in self.peaks or (0, 0, 0, 0)]
        return {**self.names, **dict(zip(columns, peaks, strict=True)), "copy_gb_s": f"{self.copy_bytes / 1e9:.1f}"}


def version(package: str) -> str:
    """Of an installed package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


class Sgemm:
    """PyTorch's matrix product at a size that no cache limit holds back: the rate that L is counted in."""

    SIZE = 2048
    FLOPS = 2 * SIZE**3

    def __init__(self) -> None:
        self.a, self.b = torch.randn(self.SIZE, self.SIZE), torch.randn(self.SIZE, self.SIZE)
        self.out = torch.empty(self.SIZE, self.SIZE)

    def __call__(self, _: int = 0) -> None:
        """One product."""
        torch.mm(self.a, self.b, out=self.out)


def bandwidth(runs: int = 9) -> float:
    """Median bytes/s of copying 256 MiB: bytes read and bytes written both count."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda _: target.copy_(source)}, runs)["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


#: How to compile for an instruction set.
_FLAGS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx2_vnni": ("-mavx2", "-mfma", "-mavxvnni"),
    "avx512": ("-mavx512f", "-mavx512bw"),
    "avx512_vnni": ("-mavx512f", "-mavx512bw", "-mavx512vnni"),
    "avx512_amx": ("-mavx512f", "-mavx512bw", "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}


@contextlib.contextmanager
def peak_program(isa: str, threads: int) -> Iterator[Callable[[], Peaks] | None]:
    """What measures the best that an instruction set can do, compiled; None without g++, or without vectors."""
    compiler = shutil.which("g++")
    if compiler is None or isa not in _FLAGS:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        source = Path(__file__).with_name("peaks.cpp")
        subprocess.run([compiler, "-O3", "-std=c++20", "-pthread", *_FLAGS[isa], source, "-o", program], check=True)

        def measure() -> Peaks:
            run = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
            return Peaks(*map(float, run.stdout.split()))

        yield measure


def register_peaks(isa: str, threads: int) -> Peaks | None:
    """What an instruction set can do at best, measured once; None where `peak_program` is."""
    with peak_program(isa, threads) as measure:
        return measure() if measure else None
