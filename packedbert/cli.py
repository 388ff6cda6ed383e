"""The `packedbert` command. Heavy imports stay inside the commands, so that --help is quick."""

import contextlib
import csv
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import __version__

# A pipe has no width: leave the tables room.
OUT = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110)
ERR = Console(stderr=True)

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


class Group(click.Group):
    """A group whose commands end in one line on stderr and exit status 1 where they fail."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; --debug lets tracebacks through."""
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"packedbert: {message}", "yellow")
            try:
                return super().invoke(ctx)
            except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError):
                raise  # click prints these, or ends quietly
            except Exception as error:
                if ctx.params.get("debug"):
                    raise
                expected = isinstance(error, ValueError | TypeError | OSError | RuntimeError | IndexError)
                text = str(error) if expected else f"{type(error).__name__}: {error} (a bug? --debug shows where)"
                say(f"packedbert: {text}", "red")
                ctx.exit(1)


def say(text: str, style: str) -> None:
    """One line on stderr: transformers' messages have several."""
    ERR.print(" ".join(text.split()), style=style, markup=False, highlight=False, soft_wrap=True)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="packedbert")
def main(debug: bool) -> None:
    """Run structurally pruned BERTs as fast as the weights that are left allow.

    \b
    packedbert demo                                    what it does, in half a minute, offline
    packedbert qa --model DIR -q "Who?" -c "..."       answer a question
    packedbert inspect DIR                             what is left of a checkpoint
    packedbert eval --model DIR --data dev.json.gz     exact match and F1 on SQuAD
    packedbert bench                                   dense, packed eager and patched, side by side
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()


def backend_option(command: Any) -> Any:
    """--backend, as PackedBertConfig has it."""
    text = 'Kernels to run on: "auto", "cpu" or "reference" (plain PyTorch).'
    return click.option("--backend", default="auto", show_default=True, help=text)(command)


def precision_option(command: Any) -> Any:
    """--precision, as PackedBertConfig has it."""
    text = 'What the encoder\'s matrices are stored in: "fp32", "bf16", "fp16" or "int8" (computed in, too).'
    return click.option("--precision", default="fp32", show_default=True, help=text)(command)


def json_option(command: Any) -> Any:
    """--json, for machines."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command)


def load_answerer(model_id: str, backend: str, precision: str = "fp32", *, packed: bool = True) -> Any:
    """A QuestionAnswerer of a checkpoint, loaded in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

    import packedbert

    from .hf import stored_task

    if stored_task(model_id) != "question-answering":
        found = AutoConfig.from_pretrained(model_id).architectures
        if found and not any(name.endswith("ForQuestionAnswering") for name in found):
            # transformers would go on with a random head.
            raise ValueError(f"{model_id}: expected a question-answering checkpoint, got {', '.join(found)}")
    if packed:
        config = packedbert.PackedBertConfig(backend=backend, precision=precision)
        model = packedbert.load(model_id, task="question-answering", config=config, dtype=torch.float32)
    else:
        model = AutoModelForQuestionAnswering.from_pretrained(model_id, dtype=torch.float32)
    return packedbert.QuestionAnswerer(model, AutoTokenizer.from_pretrained(model_id))


@contextlib.contextmanager
def progress_bar(label: str, *, hidden: bool) -> Iterator[Any]:
    """A callable (done, total) that draws a bar on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, disable=hidden or not ERR.is_terminal, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


# ----------------------------------------------------------------------------------------------------- qa


@main.command()
@click.option("--model", "model_id", required=True, metavar="ID_OR_DIR", help="Hub id or folder of the checkpoint.")
@click.option("-q", "--question", help='The question; "-" reads it from standard input.')
@click.option("-c", "--context", help='Where to look; "-", or nothing, reads it from standard input.')
@click.option("--context-file", type=click.File("rb"), help="A text file to look in.")
@click.option(
    "--input",
    "input_file",
    type=click.File("rb"),
    help='A file of {"question", "context"} objects: a JSON list, or one a line.',
)
@click.option("--top-k", default=1, show_default=True, help="Answers to each question.")
@click.option("--doc-stride", type=int, help="Tokens that windows of a long context share.  [default: 128]")
@click.option("--max-answer-len", default=15, show_default=True, help="Tokens of the longest answer.")
@click.option("--batch-size", default=16, show_default=True, help="Windows run at once.")
@backend_option
@precision_option
@json_option
def qa(
    model_id: str,
    question: str | None,
    context: str | None,
    context_file: Any,
    input_file: Any,
    as_json: bool,
    backend: str,
    precision: str,
    **options: Any,
) -> None:
    """Answer questions from a text.

    \b
    packedbert qa --model DIR -q "Who wrote it?" -c "It was written by Ada."
    packedbert qa --model DIR -q "Who wrote it?" < book.txt
    packedbert qa --model DIR --input questions.jsonl --json
    """
    if input_file is not None:
        if question or context or context_file:
            raise click.UsageError("--input brings questions and contexts of its own: leave out -q, -c, --context-file")
        items = read_items(input_file)
    else:
        if not question:
            raise click.UsageError("a question is needed: -q TEXT, or --input FILE")
        if context is not None and context_file is not None:
            raise click.UsageError("one context is needed: leave out -c or --context-file")
        if question == "-":
            if context_file is None and context in (None, "-"):
                raise click.UsageError("standard input is the question: give the context with -c or --context-file")
            question = read_text(sys.stdin.buffer).strip()
        if context_file is not None:
            context = read_text(context_file)
        elif context is None or context == "-":
            if context is None and sys.stdin.isatty():
                raise click.UsageError("a context is needed: -c TEXT, --context-file FILE, or standard input")
            context = read_text(sys.stdin.buffer)
        items = [(question, context)]
    answerer = load_answerer(model_id, backend, precision)
    questions, contexts = [item[0] for item in items], [item[1] for item in items]
    with progress_bar("answering", hidden=as_json) as progress:
        found = answerer(question=questions, context=contexts, progress=progress, **options)
    answers = [answer if isinstance(answer, list) else [answer] for answer in found]
    if as_json:
        rows = [{"question": q, "answers": a} for q, a in zip(questions, answers, strict=True)]
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for (asked, text), best in zip(items, answers, strict=True):
        show_answers(asked, text, best)


def read_text(file: Any) -> str:
    """All of a binary file, as UTF-8.

    Raises:
        ClickException: it is something else.
    """
    try:
        return str(file.read(), "utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.ClickException(
            f"{getattr(file, 'name', 'standard input')}: expected UTF-8 text, got {error}; convert it first"
        ) from error


def read_items(file: Any) -> list[tuple[str, str]]:
    """(question, context) of a JSON list, of one object, or of one object a line.

    Raises:
        ClickException: it is something else; the text names the line or the entry.
    """
    text = read_text(file)
    try:
        rows = json.loads(text)
        named_rows = (
            [("the file", rows)] if isinstance(rows, dict) else [(f"entry {i}", row) for i, row in enumerate(rows)]
        )
    except (ValueError, TypeError):
        named_rows = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    items = []
    for place, row in named_rows:
        try:
            row = json.loads(row) if isinstance(row, str) else row
            items.append((row["question"], row["context"]))
        except (ValueError, KeyError, TypeError) as error:
            wanted = 'expected {"question": ..., "context": ...} objects, as a JSON list or one a line'
            raise click.ClickException(f"{file.name}: {wanted}; {place} is something else: {error!r}") from error
    if not items:
        raise click.ClickException(f"{file.name}: expected questions, got none")
    return items


def show_answers(question: str, context: str, answers: list[dict[str, Any]]) -> None:
    """The best answer, marked where it stands, and the others below it."""
    OUT.print(Text(question, style="bold"))
    best = answers[0]
    around = 160
    start, end = max(0, best["start"] - around), min(len(context), best["end"] + around)
    shown = Text("  " + ("..." if start else "") + context[start : best["start"]])
    marked = context[best["start"] : best["end"]]
    shown.append(marked if OUT.is_terminal or not marked else f">>{marked}<<", style="bold reverse green")
    shown.append(context[best["end"] : end] + ("..." if end < len(context) else ""))
    OUT.print(shown)
    for answer in answers:
        OUT.print(Text(f"  {answer['score']:6.1%}  {answer['answer'] or '(no answer)'}", style="green"))
    OUT.print()


# ------------------------------------------------------------------------------------------------ inspect


@main.command()
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

    from .hf import stored_task
    from .patch import report_of

    report = report_of(packedbert.load(model_id, task=stored_task(model_id), dtype=torch.float32))
    if as_json:
        layers = [layer.__dict__ for layer in report.layers]
        totals = {name: getattr(report, name) for name in ("parameters_dense", "parameters_before", "parameters_after")}
        click.echo(json.dumps({**totals, "backend": report.backend, "isa": report.isa, "layers": layers}, indent=2))
    else:
        OUT.print(report)


# --------------------------------------------------------------------------------------------------- eval


@main.command(name="eval")
@click.option("--model", "model_id", required=True, metavar="ID_OR_DIR", help="Hub id or folder of the checkpoint.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="SQuAD v1.1 format, JSON or gzipped JSON.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first questions.")
@click.option("--no-patch", is_flag=True, help="Run the stock model instead, to compare (dense checkpoints only).")
@click.option("--batch-size", default=16, show_default=True, help="Windows run at once.")
@backend_option
@precision_option
@json_option
def evaluate(
    model_id: str,
    data: Path,
    limit: int | None,
    no_patch: bool,
    batch_size: int,
    backend: str,
    precision: str,
    as_json: bool,
) -> None:
    """Exact match and F1 on a SQuAD-format file, and questions per second.

    \b
    packedbert eval --model DIR --data dev-v1.1.json
    packedbert eval --model DIR --data dev-v1.1.json.gz --limit 200 --no-patch
    packedbert eval --model DIR --data dev-v1.1.json --precision int8
    """
    import time

    from . import squad

    if no_patch and precision != "fp32":
        raise click.UsageError("--precision is of the patched model: leave out --no-patch")
    dataset = squad.first_questions(squad.load_squad(data), limit)
    examples = list(squad.squad_examples(dataset))
    if not examples:
        raise ValueError(f"{data}: expected questions, got none")
    ids, questions, contexts = zip(*examples, strict=True)
    answerer = load_answerer(model_id, backend, precision, packed=not no_patch)
    start = time.perf_counter()
    with progress_bar(f"{len(ids):,} questions", hidden=as_json) as progress:
        answers = answerer(question=list(questions), context=list(contexts), batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - start
    predictions = {id: answer["answer"] for id, answer in zip(ids, answers, strict=True)}
    report = getattr(answerer.model, "packedbert_report", None)
    result = {
        **squad.squad_metrics(predictions, dataset),
        "questions": len(ids),
        "seconds": seconds,
        "questions_per_second": len(ids) / seconds,
        "backend": report.backend if report else "stock transformers",
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    table = Table(title=f"{model_id} on {data.name}")
    for name in ("exact match", "F1", "questions", "questions/s", "backend"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{result['exact_match']:.2f}",
        f"{result['f1']:.2f}",
        f"{len(ids):,}",
        f"{result['questions_per_second']:.1f}",
        str(result["backend"]),
    )
    OUT.print(table)


# ------------------------------------------------------------------------------------------- bench, demo


@main.command()
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

    from . import bench as lab
    from .patch import report_of

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
    from . import bench as lab

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


@main.command()
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

    from . import bench as lab
    from .patch import report_of

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


@main.command()
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
