"""`packedbert demo`: what packing does, offline; or a real model's answers."""

import json

import click
from rich.table import Table

from .answer import show_answers
from .common import ERR, OUT, backend_option, json_option, load_answerer
from .speed import find_structure, named, speed_table

EIFFEL = (
    "The Eiffel Tower is a lattice tower of wrought iron on the Champ de Mars in Paris, France. It bears the name "
    "of the engineer Gustave Eiffel, whose company designed it and built it from 1887 to 1889."
)
CHOPIN = (
    "Frédéric François Chopin, born Fryderyk Franciszek Chopin (1 March 1810 - 17 October 1849), was a Polish "
    "composer and virtuoso pianist of the Romantic era who wrote primarily for solo piano."
)

#: What the demo asks a real model: the two questions of the seed's model card, and two more.
DEMO_QUESTIONS = (
    ("Where is the Eiffel Tower located?", EIFFEL),
    ("Who is Frederic Chopin?", CHOPIN),
    ("When was the tower built?", EIFFEL),
    ("What did Chopin write for?", CHOPIN),
)


@click.command()
@click.option("--model", "model_id", metavar="ID_OR_DIR", help="Ask a real question-answering model instead.")
@click.option("--structure", default="x2.44-f87.7", show_default=True, help="The structure to build without --model.")
@backend_option
@json_option
def demo(model_id: str | None, structure: str, backend: str, as_json: bool) -> None:
    """Show what packing does: parameters, exactness, speed. Offline, with random weights.

    \b
    packedbert demo
    packedbert demo --model DIR        answers real questions
    """
    if model_id is not None:
        demo_answers(model_id, backend, as_json)
        return
    import torch

    from .. import bench as lab
    from ..patch import report_of

    shape = find_structure(structure)
    with ERR.status(f"building {shape.name} three times: dense, packed in stock modules, patched"):
        models = lab.build_models(shape, backend)
    with ERR.status("comparing with float64"):
        padded = lab.random_batch(shape, 4, min(48, shape.max_length), ragged=True)
        exact = lab.exactness(models.patched, lab.build_stock(shape, stored=True), padded)
    cells = ((1, min(128, shape.max_length)), (8, min(128, shape.max_length)))
    with ERR.status("timing", refresh_per_second=0.5):
        races = [lab.race(named(models), shape, batch, length, 5) for batch, length in cells]
    report = report_of(models.patched)
    dense = sum(parameter.numel() for parameter in models.dense.parameters())
    if as_json:
        parameters = {"dense": dense, "stored": report.parameters_before, "packed": report.parameters_after}
        speed = [result._asdict() for race in races for result in race]
        result = {
            "structure": shape.name,
            "backend": report.backend,
            "isa": report.isa,
            "threads": torch.get_num_threads(),
            "parameters": parameters,
            "difference": exact._asdict(),
            "speed": speed,
        }
        click.echo(json.dumps(result, indent=2))
        return
    OUT.print(report)
    table = Table("parameters", "number", "of dense", title=f"{shape.name}: random weights, real structure")
    counts = {"dense": dense, "stored by nn_pruning": report.parameters_before, "packed": report.parameters_after}
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", f"{count / dense:.0%}")
    OUT.print(table)
    table = Table("largest difference from float64", "value", title="padded batch, real tokens")
    table.add_row("logits", f"{exact.logits:.1e}")
    table.add_row("last hidden state", f"{exact.hidden_state:.1e}")
    OUT.print(table)
    for (batch, length), results in zip(cells, races, strict=True):
        OUT.print(speed_table(results, f"batch {batch}, length {length}"))


def demo_answers(model_id: str, backend: str, as_json: bool) -> None:
    """Ask a real model the demo's questions."""
    answerer = load_answerer(model_id, backend)
    questions, contexts = ([item[i] for item in DEMO_QUESTIONS] for i in range(2))
    answers = answerer(question=questions, context=contexts)
    if as_json:
        rows = [{"question": q, **answer} for q, answer in zip(questions, answers, strict=True)]
        click.echo(json.dumps({"answers": rows}, ensure_ascii=False, indent=2))
        return
    for (question, context), answer in zip(DEMO_QUESTIONS, answers, strict=True):
        show_answers(question, context, [answer])
