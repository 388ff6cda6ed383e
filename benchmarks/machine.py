"""What a benchmark ran on, and what that machine can do at best: its sgemm rate, its FMA peak, its bandwidth."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

import packedbert
from packedbert import dispatch
from packedbert.bench import interleaved

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


@dataclass(frozen=True)
class Machine:
    """What the figures of a run were taken on.

    Attributes:
        names: processor, threads, instruction set, date, versions.
        fma_flops: FLOP/s of multiply-adds on registers alone, on all threads; None where there is no compiler.
        copy_bytes: bytes/s of a copy in memory, read and written.
    """

    names: dict[str, str]
    fma_flops: float | None
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
        return cls(names, fma_peak(names["isa"], threads), bandwidth())

    def columns(self) -> dict[str, str]:
        """One column of a CSV each."""
        peak = "" if self.fma_flops is None else f"{self.fma_flops / 1e9:.1f}"
        return {**self.names, "fma_gflops": peak, "copy_gb_s": f"{self.copy_bytes / 1e9:.1f}"}


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


def fma_peak(isa: str, threads: int) -> float | None:
    """FLOP/s of a loop of fused multiply-adds on registers alone; None without g++, or without vectors."""
    compiler = shutil.which("g++")
    flags = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f"]}.get(isa)
    if compiler is None or flags is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        source = Path(__file__).with_name("fma_peak.cpp")
        subprocess.run([compiler, "-O2", "-std=c++20", "-pthread", *flags, source, "-o", program], check=True)
        run = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    return float(run.stdout)
