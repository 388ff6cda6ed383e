"""A CSV that is written row by row, each with the machine that it comes from: an interrupted run keeps what it has."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import machine
from rich.console import Console

RESULTS = Path(__file__).parent / "results"

#: Progress and what was skipped; the figures go to stdout.
console = Console(stderr=True)


def summary(seconds: Iterable[float]) -> dict[str, float | int]:
    """The columns that say how long something took."""
    seconds = list(seconds)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "calls": len(seconds),
        "median_ms": round(1e3 * median, 4),
        "quartile_1_ms": round(1e3 * low, 4),
        "quartile_3_ms": round(1e3 * high, 4),
    }


def write(file: Path, rows: Iterable[dict[str, Any]], about: machine.Machine) -> None:
    """Write rows as they come, and echo them.

    Args:
        file: the CSV; replaced.
        rows: all with the same keys.
        about: the machine; its columns follow the rows' own.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = about.columns()
    with file.open("w", newline="") as out:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(out, [*row, *columns])
                writer.writeheader()
            writer.writerow({**row, **columns})
            out.flush()
            print("  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    print(f"written: {file}")
