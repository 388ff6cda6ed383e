"""`packedbert inspect`, `report` and `backends`: what there is."""

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from .common import ERR, OUT, json_option, say


@click.command()
@click.argument("model_id", metavar="ID_OR_DIR")
@json_option
def inspect(model_id: str, as_json: bool) -> None:
    """Show what is left of a checkpoint, layer by layer.

    \b
    packedbert inspect madlag/bert-base-uncased-squadv1-x2.44-f87.7-d26-hybrid-filled-v1
    packedbert inspect DIR --json
    """
    import torch

    import packedbert

    from ..hf import stored_task
    from ..patch import report_of

    report = report_of(packedbert.load(model_id, task=stored_task(model_id), dtype=torch.float32))
    if as_json:
        layers = [layer.__dict__ for layer in report.layers]
        totals = {name: getattr(report, name) for name in ("parameters_dense", "parameters_before", "parameters_after")}
        click.echo(json.dumps({**totals, "backend": report.backend, "isa": report.isa, "layers": layers}, indent=2))
    else:
        OUT.print(report)


@click.command()
@click.argument("model_id", metavar="ID_OR_DIR")
@click.option("-o", "--output", default="report.html", show_default=True, type=Path, help="The page.")
@click.option("--png", type=Path, metavar="DIR", help="Also draw density.png and heads.png into a folder.")
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    metavar="[LABEL=]FILE",
    help="What `packedbert eval --json` printed, for a table; may be given several times.",
)
@click.option("--measure", is_flag=True, help="Also time it against its dense self; leave the machine alone meanwhile.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Of FLOPs and --measure.")
@click.option("--length", type=click.IntRange(min=1), help="Of FLOPs and --measure.  [default: 128]")
@click.option("--runs", default=10, show_default=True, type=click.IntRange(min=1), help="Timed runs of each.")
@json_option
def report(
    model_id: str,
    output: Path,
    png: Path | None,
    evaluations: tuple[str, ...],
    measure: bool,
    batch: int,
    length: int | None,
    runs: int,
    as_json: bool,
) -> None:
    """Show what was pruned, on a page that opens in any browser.

    \b
    packedbert report DIR
    packedbert report DIR -o page.html --png pictures --measure
    packedbert report DIR --evaluation pruned=pruned.json --evaluation dense=dense.json
    """
    from .. import report_page
    from ..hf import load, stored_task
    from ..summary import measure_speed, summarize_model

    # What can go wrong goes wrong before the model is loaded and timed.
    results = read_evaluations(evaluations)
    report_page.check_destinations(output, png)
    model = load(model_id, task=stored_task(model_id))
    # A page may be passed on: it names a folder, not where that was.
    name = Path(model_id).resolve().name if Path(model_id).is_dir() else model_id
    summary = summarize_model(model, name, batch=batch, length=length)
    speed = []
    if measure:
        # A lively spinner would take time from what is timed.
        with ERR.status("timing", refresh_per_second=0.5):
            speed = measure_speed(model, summary.batch, summary.length, runs)
    files = report_page.write_report(summary, output, pictures=png, evaluations=results, speed=speed)
    if as_json:
        more = {"evaluations": results, "speed": [result._asdict() for result in speed], "files": list(map(str, files))}
        click.echo(json.dumps({**summary.as_dict(), **more}, indent=2))
        return
    OUT.print(summary.report)
    say(f"wrote {', '.join(map(str, files))}", "green")


def read_evaluations(options: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Label -> evaluation, of "label=file" or "file", whose name is its label then.

    Raises:
        BadParameter: a label that comes twice.
        ValueError: a file that is no evaluation.
    """
    from ..report_page import read_evaluation

    found: dict[str, dict[str, Any]] = {}
    for option in options:
        label, separator, file = option.partition("=")
        if not separator or Path(option).exists():
            label, file = Path(option).stem, option
        if not label or label in found:
            problem = "twice" if label else "none"
            raise click.BadParameter(f"{option}: expected a label of its own, got it {problem}: LABEL=FILE")
        found[label] = read_evaluation(file)
    return found


@click.command()
def backends() -> None:
    """Show which kernels are built, and which work here.

    \b
    packedbert backends
    """
    import packedbert

    table = Table("backend", "built", "usable", "")
    for status in packedbert.backends():
        table.add_row(status.name, "yes" if status.built else "no", "yes" if status.usable else "no", status.detail)
    OUT.print(table)
