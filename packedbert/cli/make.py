"""`packedbert prune`: a dense checkpoint in, a pruned and a packed one out."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .common import ERR, OUT, json_option, precision_option, say


@click.command()
@click.option("--model", "model_id", required=True, metavar="ID_OR_DIR", help="A dense BERT for question answering.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Training data, SQuAD v1.1 format.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for what is made.")
@click.option("--target", default=2.0, show_default=True, help="Times faster than the dense model, both patched.")
@click.option("--cost", default="measured", show_default=True, help='"measured" on this machine, or "flops".')
@click.option("--method", default="fisher", show_default=True, help='Importance: "fisher" or "magnitude".')
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1), help="That speed is asked for.")
@click.option("--length", default=128, show_default=True, type=click.IntRange(min=1), help="That speed is asked for.")
@click.option("--examples", default=2048, show_default=True, type=click.IntRange(min=1), help="Seen while pruning.")
@click.option("--epochs", default=0.0, show_default=True, help="Training afterwards, with the dense model as teacher.")
@click.option("--minutes", type=float, help="Stop training after so long; --epochs is the most, 3 without it.")
@click.option("--learning-rate", default=1e-4, show_default=True, help="Of the training.")
@click.option("--bfloat16", is_flag=True, help="Train in bfloat16: faster on processors that have it.")
@click.option("--seed", default=0, show_default=True, help="Of the examples' choice and order.")
@precision_option
@json_option
def prune(
    model_id: str,
    data: Path,
    output: Path,
    target: float,
    cost: str,
    method: str,
    batch: int,
    length: int,
    examples: int,
    epochs: float,
    minutes: float | None,
    learning_rate: float,
    bfloat16: bool,
    seed: int,
    precision: str,
    as_json: bool,
) -> None:
    """Make a dense model so many times faster: remove heads and FFN rows, refit the rest, then perhaps train.

    Writes OUTPUT/pruned (nn_pruning's format) and OUTPUT/packed (smaller, loads faster). Interrupted while
    training, the same command goes on where it was.

    \b
    packedbert prune --model DIR --data train.json -o out --target 2
    packedbert prune --model DIR --data train.json -o out --target 2 --minutes 60
    packedbert eval --model out/packed --data dev.json
    """
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    import packedbert

    packedbert.PackedBertConfig(precision=precision)  # an unknown one is refused before anything is done
    if epochs == 0.0 and minutes is not None:
        epochs = 3.0
    output.mkdir(parents=True, exist_ok=True)  # what can't be written is found out first
    settings = {
        "model": str(model_id), "data": str(data), "target": target, "cost": cost, "method": method, "batch": batch,
        "length": length, "examples": examples, "seed": seed, "precision": precision,
    }  # fmt: skip
    state = output / "state"
    dataset = packedbert.load_squad(data)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoModelForQuestionAnswering.from_pretrained(model_id, dtype=torch.float32).eval()
    labelled = packedbert.squad_training_examples(dataset, tokenizer)
    torch.manual_seed(seed)
    with bars(hidden=as_json) as progress:
        pruned: Any
        if (state / "settings.json").exists():
            before = json.loads((state / "settings.json").read_text())
            if before["settings"] != settings:
                different = ", ".join(key for key, value in settings.items() if before["settings"].get(key) != value)
                raise ValueError(
                    f"{state}: expected a state of the same command, got one with another {different}; delete it, or "
                    "name another --output"
                )
            say(f"going on with what {state} holds", "yellow")
            speedup = before["speedup"]
            pruned = AutoModelForQuestionAnswering.from_pretrained(state, dtype=torch.float32).eval()
        else:
            chosen = torch.randperm(len(labelled))[:examples].tolist()
            pruned = packedbert.prune_model(
                model, [labelled[index] for index in chosen], target, method=method, cost_model=cost, batch=batch,
                length=length, precision=precision, progress=progress,
            )  # fmt: skip
            speedup = pruned.packedbert_pruning.speedup
            pruned.save_pretrained(state)
            (state / "settings.json").write_text(json.dumps({"settings": settings, "speedup": speedup}))
        if epochs:
            recipe = packedbert.Recipe(epochs=epochs, learning_rate=learning_rate, seed=seed, bfloat16=bfloat16)

            def step(done: int, total: int, loss: float) -> None:
                progress("training", done, total, f"loss {loss:.3f}")

            try:
                packedbert.recover_model(pruned, model, labelled, recipe, minutes=minutes, folder=state, progress=step)
            except KeyboardInterrupt:
                say(f"interrupted; the same command goes on with what {state} holds", "yellow")
                raise
    folders = {"pruned": output / "pruned", "packed": output / "packed"}
    packedbert.save_pruned(pruned, folders["pruned"])
    packedbert.patch_model(pruned, keep_original=False, precision=precision)
    pruned.save_pretrained(folders["packed"])
    for folder in folders.values():
        tokenizer.save_pretrained(folder)
    report = pruned.packedbert_report
    if as_json:
        layers = [{"heads": len(layer.heads), "ffn_width": layer.ffn_width} for layer in report.layers]
        result = {"speedup": speedup, "layers": layers, **{name: str(folder) for name, folder in folders.items()}}
        click.echo(json.dumps(result, indent=2))
        return
    OUT.print(report)
    table = Table("", "", show_header=False)
    table.add_row("expected speed-up over the dense model", f"{speedup:.2f}x ({cost}, batch {batch}, length {length})")
    table.add_row("nn_pruning's format", str(folders["pruned"]))
    table.add_row("packed", str(folders["packed"]))
    OUT.print(table)


@contextlib.contextmanager
def bars(*, hidden: bool) -> Iterator[Any]:
    """A callable (what, done, total, note) that draws a bar for each kind of work on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, disable=hidden or not ERR.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int, note: str = "") -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total, description=f"{what} {note}".strip())

        yield report
