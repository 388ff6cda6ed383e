"""What the commands share: consoles, options, progress, and how a checkpoint is loaded to answer questions."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..dispatch import BACKENDS

# A pipe has no width: leave the tables room.
OUT = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110)
ERR = Console(stderr=True)


def say(text: str, style: str) -> None:
    """One line on stderr: transformers' messages have several."""
    ERR.print(" ".join(text.split()), style=style, markup=False, highlight=False, soft_wrap=True)


def backend_option(command: Any) -> Any:
    """--backend, as PackedBertConfig has it."""
    text = f"Kernels to run on: {', '.join(BACKENDS)} (plain PyTorch)."
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

    from ..hf import stored_task

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
