"""`packedbert demo`: a pruned model's answers to real questions, and what packing does to the seed's structure."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.table import Table

from .answer import show_answers
from .common import ERR, OUT, backend_option, json_option, load_answerer, say
from .speed import find_structure, named, speed_table

#: Shipped with the package: benchmarks/make_demo_model.py makes it; its README.md names sources and licence.
DEMO_MODEL = Path(__file__).parents[1] / "demo_model"

EIFFEL = (
    "The Eiffel Tower is a lattice tower of wrought iron on the Champ de Mars in Paris, France. It bears the name "
    "of the engineer Gustave Eiffel, whose company designed it and built it from 1887 to 1889."
)
CHOPIN = (
    "Frédéric François Chopin, born Fryderyk Franciszek Chopin (1 March 1810 - 17 October 1849), was a Polish "
    "composer and virtuoso pianist of the Romantic era who wrote primarily for solo piano."
)
GLACIER = (
    "The Aletsch Glacier is the largest glacier in the Alps. It has a length of about 23 kilometres and lies in the "
    "canton of Valais in Switzerland. Three smaller glaciers meet at Konkordia, where the ice is some 900 metres thick."
)
LOVELACE = (
    "Ada Lovelace was an English mathematician who worked with Charles Babbage on his Analytical Engine. In 1843 she "
    "published a translation of an article by the engineer Luigi Menabrea, with notes of her own three times as long."
)
TEA = (
    "Tea plants grow best in tropical climates, at heights of up to 1,500 metres. The leaves are picked by hand every "
    "one to two weeks. Black tea is fully oxidised before it is dried, while green tea is heated soon after picking."
)


class Question(NamedTuple):
    """What the demo asks, and which answers count as right: as SQuAD's exact match compares them."""

    question: str
    context: str
    expected: tuple[str, ...]


#: The two questions of the seed's model card, and eight more.
DEMO_QUESTIONS = (
    Question(
        "Where is the Eiffel Tower located?",
        EIFFEL,
        ("Champ de Mars", "Paris, France", "Champ de Mars in Paris, France"),
    ),
    Question("Who is Frederic Chopin?", CHOPIN, ("a Polish composer and virtuoso pianist", "Polish composer")),
    Question("Who designed the Eiffel Tower?", EIFFEL, ("Gustave Eiffel",)),
    Question("What did Chopin write for?", CHOPIN, ("solo piano",)),
    Question("How long is the Aletsch Glacier?", GLACIER, ("about 23 kilometres", "23 kilometres")),
    Question("Which canton is the glacier in?", GLACIER, ("Valais", "canton of Valais")),
    Question("When did Lovelace publish her translation?", LOVELACE, ("1843",)),
    Question("Who wrote the article that Lovelace translated?", LOVELACE, ("Luigi Menabrea",)),
    Question("How often are the leaves picked?", TEA, ("every one to two weeks", "one to two weeks")),
    Question("Which tea is heated soon after picking?", TEA, ("green tea", "green")),
)


@click.command()
@click.option("--model", "model_id", metavar="ID_OR_DIR", help="Ask another question-answering model.")
@click.option("--structure", default="x2.44-f87.7", show_default=True, help="The structure to time, by name.")
@backend_option
@json_option
def demo(model_id: str | None, structure: str, backend: str, as_json: bool) -> None:
    """Ask a small pruned model ten questions; then time the seed model's structure. Offline.

    The model was pruned to twice the speed, trained again, and stored in int8. The structure has random weights: speed
    and exactness don't depend on what was learned.

    \b
    packedbert demo
    packedbert demo --model DIR        asks another model
    """
    shape = find_structure(structure)
    result = {"answers": ask(model_id, backend, as_json)} | time_structure(shape, backend, as_json)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False, indent=2))


def ask(model_id: str | None, backend: str, quiet: bool) -> list[dict[str, Any]]:
    """Ask the demo's questions, and show what came unless `quiet`."""
    from ..squad import is_exact

    if model_id is None and not (DEMO_MODEL / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{DEMO_MODEL}: expected the demo's model there, found none; install packedbert anew, or name a model with "
            "--model"
        )
    answerer = load_answerer(str(model_id or DEMO_MODEL), backend)
    asked, contexts = [item.question for item in DEMO_QUESTIONS], [item.context for item in DEMO_QUESTIONS]
    rows = []
    for item, answer in zip(DEMO_QUESTIONS, answerer(question=asked, context=contexts), strict=True):
        right = is_exact(answer["answer"], item.expected)
        rows.append({"question": item.question, **answer, "expected": item.expected[0], "right": right})
        if not quiet:
            show_answers(item.question, item.context, [answer])
            if not right:
                say(f"  expected: {item.expected[0]}", "yellow")
    if not quiet:
        good = sum(row["right"] for row in rows)
        OUT.print(f"{good} of {len(rows)} right; backend {answerer.model.packedbert_report.backend}\n", highlight=False)
    return rows


def time_structure(shape: Any, backend: str, quiet: bool) -> dict[str, Any]:
    """Build a structure dense, packed in stock modules, and patched; compare, time, and show unless `quiet`."""
    import torch

    from .. import bench as lab
    from ..patch import report_of

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
    counts = {"dense": dense, "stored": report.parameters_before, "packed": report.parameters_after}
    if not quiet:
        OUT.print(report)
        table = Table("parameters", "number", "of dense", title=f"{shape.name}: random weights, real structure")
        for name, count in zip(("dense", "stored by nn_pruning", "packed"), counts.values(), strict=True):
            table.add_row(name, f"{count:,}", f"{count / dense:.0%}")
        OUT.print(table)
        table = Table("largest difference from float64", "value", title="padded batch, real tokens")
        table.add_row("logits", f"{exact.logits:.1e}")
        table.add_row("last hidden state", f"{exact.hidden_state:.1e}")
        OUT.print(table)
        for (batch, length), results in zip(cells, races, strict=True):
            OUT.print(speed_table(results, f"batch {batch}, length {length}"))
    return {
        "structure": shape.name,
        "backend": report.backend,
        "isa": report.isa,
        "threads": torch.get_num_threads(),
        "parameters": counts,
        "difference": exact._asdict(),
        "speed": [result._asdict() for race in races for result in race],
    }
