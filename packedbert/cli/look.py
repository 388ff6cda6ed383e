"""`packedbert inspect` and `packedbert backends`: what there is."""

import json

import click
from rich.table import Table

from .common import OUT, json_option


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
