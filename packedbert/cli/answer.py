"""`packedbert qa` and `packedbert eval`: what needs a question-answering model."""

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from .common import OUT, backend_option, json_option, load_answerer, precision_option, progress_bar

# ----------------------------------------------------------------------------------------------------- qa


@click.command()
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


# --------------------------------------------------------------------------------------------------- eval


@click.command(name="eval")
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

    from .. import squad

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
