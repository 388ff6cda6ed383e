"""`packedbert bench`: dense, packed eager and patched models, in turns."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from .common import ERR, OUT, json_option


@click.command()
@click.option("--structure", default="x2.44-f87.7", show_default=True, help="A published structure; --list names all.")
@click.option("--list", "list_structures", is_flag=True, help="List the structures and stop.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Sequences in a batch.")
@click.option("--length", default=128, show_default=True, type=click.IntRange(min=1), help="Tokens in a sequence.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of all three.  [default: PyTorch's own]")
@click.option("--runs", default=10, show_default=True, type=click.IntRange(min=1), help="Timed runs of each.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Also write the figures to a file.")
@json_option
def bench(
    structure: str,
    list_structures: bool,
    batch: int,
    length: int,
    threads: int | None,
    runs: int,
    csv_file: Path | None,
    as_json: bool,
) -> None:
    """Time dense, packed eager and patched models, in turns.

    "Packed eager" has the packed weights in stock transformers modules.

    \b
    packedbert bench --batch 8 --length 384
    packedbert bench --structure large-f91.0 --runs 5 --csv large.csv
    """
    import torch

    from .. import bench as lab
    from ..patch import report_of

    if list_structures and as_json:
        click.echo(json.dumps([dataclasses.asdict(shape) for shape in lab.STRUCTURES.values()], indent=2))
        return
    if list_structures:
        table = Table("structure", "layers", "heads", "FFN rows")
        for shape in lab.STRUCTURES.values():
            table.add_row(shape.name, str(len(shape.heads)), str(sum(shape.heads)), f"{sum(shape.ffn_widths):,}")
        OUT.print(table)
        return
    shape = find_structure(structure)
    if length > shape.max_length:
        raise click.BadParameter(f"expected at most {shape.max_length} tokens, got {length}", param_hint="--length")
    if threads:
        torch.set_num_threads(threads)
    with ERR.status("building the models"):
        models = lab.build_models(shape)
    # A lively spinner would take time from what is timed.
    with ERR.status("timing", refresh_per_second=0.5):
        results = lab.race(named(models), shape, batch, length, runs)
    report, eager = report_of(models.patched), results[1].median_ms
    about = {"structure": shape.name, "threads": torch.get_num_threads(), "backend": report.backend, "isa": report.isa}
    rows = [
        {
            **about,
            **result._asdict(),
            "times_dense": results[0].median_ms / result.median_ms,
            "times_packed_eager": eager / result.median_ms,
        }
        for result in results
    ]
    if csv_file:
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        OUT.print(speed_table(results, f"{shape.name}, batch {batch}, length {length}"))


def find_structure(name: str) -> Any:
    """A structure by name, or a message that lists them."""
    from .. import bench as lab

    if name not in lab.STRUCTURES:
        known = ", ".join(lab.STRUCTURES)
        raise click.BadParameter(f"expected one of {known}, got {name!r}", param_hint="--structure")
    return lab.STRUCTURES[name]


def named(models: Any) -> dict[str, Any]:
    """The contestants under the names of the tables."""
    return {"dense BERT, eager": models.dense, "packed, eager": models.eager, "packedbert": models.patched}


def speed_table(results: list[Any], title: str) -> Table:
    """Medians, quartiles, and how many times faster than the first and the second each is."""
    import torch

    table = Table(title=f"{title}, {torch.get_num_threads()} threads")
    for name in ("model", "median", "quartiles", "x dense", "x packed eager"):
        table.add_column(name, justify="left" if name == "model" else "right")
    dense, eager = results[0].median_ms, results[1].median_ms
    for result in results:
        table.add_row(
            result.model,
            f"{result.median_ms:.1f} ms",
            f"{result.quartile_1_ms:.1f} to {result.quartile_3_ms:.1f}",
            f"{dense / result.median_ms:.2f}",
            f"{eager / result.median_ms:.2f}",
        )
    return table
