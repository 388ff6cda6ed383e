"""What pruning costs and gains on a real model: `python benchmarks/bench_prune.py --model DIR --train F --dev F`.

The dense model is pruned to 1.5, 2 and 3 times the speed of its dense self with the same kernels, without training; at
2x it is then trained with the dense model as the teacher, and so is, for comparison, the dense model itself (the
control: the same steps on the same data, nothing pruned). Exact match and F1 on the dev file, and speed, of all of
them. The dev file plays no part in any choice. Takes an hour or two, keeps every stage in --work, and goes on from
there when it is interrupted.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import machine
import record
import torch
import transformers
from rich.progress import Progress
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import packedbert
from packedbert import bench, cost, prune, squad
from packedbert.examples import squad_training_examples
from packedbert.patch import report_of
from packedbert.recover import Recipe, recover_model

TARGETS = (1.5, 2.0, 3.0)
RECOVERED = 2.0

#: Examples that importance and reconstruction see.
CALIBRATION = 2048

#: What speed is asked for, and measured at.
BATCH, LENGTH = 8, 128

#: In bfloat16 a step takes half the time, where the processor has it.
RECIPE = Recipe(epochs=1.5, learning_rate=1e-4, bfloat16=True)


def answers(model: torch.nn.Module, tokenizer: Any, dataset: dict[str, Any]) -> dict[str, str]:
    """Question id -> answer; `model` is run as it is."""
    ids, questions, contexts = zip(*squad.squad_examples(dataset), strict=True)
    found = packedbert.QuestionAnswerer(model, tokenizer)(question=list(questions), context=list(contexts))
    return {id: answer["answer"] for id, answer in zip(ids, found, strict=True)}


def patched(model: torch.nn.Module) -> torch.nn.Module:
    """A patched copy."""
    return packedbert.patch_model(copy.deepcopy(model), keep_original=False)


@torch.inference_mode()
def agreement(masked: torch.nn.Module, packed: torch.nn.Module, tokenizer: Any, dataset: dict[str, Any]) -> float:
    """The largest difference between the logits of real tokens of the masked and the packed model, on all questions."""
    _, questions, contexts = zip(*squad.squad_examples(dataset), strict=True)
    largest = 0.0
    order = sorted(range(len(questions)), key=lambda index: len(contexts[index]))
    for first in range(0, len(order), 16):
        part = order[first : first + 16]
        batch = tokenizer(
            [questions[i] for i in part], [contexts[i] for i in part], truncation="only_second", max_length=384,
            padding=True, return_tensors="pt",
        )  # fmt: skip
        one, other = masked(**batch), packed(**batch)
        real = batch["attention_mask"] != 0
        for name in ("start_logits", "end_logits"):
            largest = max(largest, (getattr(one, name) - getattr(other, name))[real].abs().max().item())
    return largest


class Stages:
    """Every model of the comparison, made once and kept in a folder."""

    def __init__(self, model_dir: Path, train: Path, work: Path, costs: str) -> None:
        self.work, self.costs = work, costs
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.dense = self._load(model_dir)
        self.examples = squad_training_examples(squad.load_squad(train), self.tokenizer)
        self.seconds: dict[str, float] = {}

    @staticmethod
    def _load(folder: Path) -> Any:
        return AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()

    def pruned(self) -> dict[float, Any]:
        """Target -> the model, not trained."""
        folders = {target: self.work / f"pruned-{target}" for target in TARGETS}
        if not all(folder.exists() for folder in folders.values()):
            data = random.Random(0).sample(self.examples, min(CALIBRATION, len(self.examples)))
            costs = {"measured": cost.measured, "flops": cost.flops}[self.costs](
                prune.structure_of(self.dense.config), BATCH, LENGTH
            )
            start = time.perf_counter()
            importance = prune.gate_gradients(self.dense, data)
            record.console.print(f"importance: {time.perf_counter() - start:.0f} s")
            for target, folder in folders.items():
                start = time.perf_counter()
                model: Any = packedbert.prune_model(self.dense, data, target, method=importance, cost_model=costs)
                record.console.print(f"pruned to {target}x: {time.perf_counter() - start:.0f} s")
                model.save_pretrained(folder)
        return {target: self._load(folder) for target, folder in folders.items()}

    def trained(self, model: Any, name: str) -> Any:
        """`model`, trained with the dense one as its teacher."""
        with Progress(console=record.console, transient=True) as progress:
            task = progress.add_task(name)

            def step(done: int, total: int, loss: float) -> None:
                progress.update(task, completed=done, total=total, description=f"{name}, loss {loss:.3f}")

            recover_model(model, self.dense, self.examples, RECIPE, folder=self.work / name, progress=step)
        self.seconds[name] = torch.load(self.work / name / "recovery.pt", weights_only=True)["seconds"]
        return model


def rows(stages: Stages, dev: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The CSV's rows."""
    pruned = stages.pruned()
    models = {"dense": stages.dense, **{f"pruned to {target}x": model for target, model in pruned.items()}}
    recovered = f"pruned to {RECOVERED}x, trained"
    models[recovered] = stages.trained(copy.deepcopy(pruned[RECOVERED]), "recovered")
    models["dense, trained as much (control)"] = stages.trained(copy.deepcopy(stages.dense), "control")
    models[recovered].save_pretrained(stages.work / "recovered-model")
    stages.tokenizer.save_pretrained(stages.work / "recovered-model")

    packed = {name: patched(model) for name, model in models.items()}
    batch = bench.random_batch(prune.structure_of(stages.dense.config), BATCH, LENGTH)
    runs = {name: (lambda _, model=model: model(**batch)) for name, model in packed.items()}
    runs["eager"] = lambda _: stages.dense(**batch)
    with torch.inference_mode():
        times = bench.interleaved(runs, 25)
    medians = {name: record.summary(seconds)["median_ms"] for name, seconds in times.items()}
    for name, model in models.items():
        found = answers(packed[name], stages.tokenizer, dev)
        result = squad.squad_metrics(found, dev)
        same, largest = "", ""
        if name == recovered:  # the others would only take longer
            masked = answers(model, stages.tokenizer, dev)
            same = f"{sum(found[id] == masked[id] for id in found)} of {len(found)}"
            largest = f"{agreement(model, packed[name], stages.tokenizer, dev):.2g}"
        kept = report_of(packed[name]).structure
        yield {
            "model": name,
            "exact_match": round(result["exact_match"], 2),
            "f1": round(result["f1"], 2),
            **record.summary(times[name]),
            "times_dense_packedbert": round(medians["dense"] / medians[name], 3),
            "times_dense_eager": round(medians["eager"] / medians[name], 3),
            "batch": BATCH,
            "length": LENGTH,
            "heads": " ".join(str(len(layer.heads)) for layer in kept.layers),
            "ffn_widths": " ".join(str(layer.ffn_width) for layer in kept.layers),
            "answers_as_masked": same,
            "logits_error": largest,
            "training_minutes": round(stages.seconds.get("control" if "control" in name else "recovered", 0) / 60, 1)
            if "trained" in name
            else 0.0,
            "recipe": f"epochs {RECIPE.epochs:g}, lr {RECIPE.learning_rate:g}, batch {RECIPE.batch_size}, alpha "
            f"{RECIPE.alpha}, temperature {RECIPE.temperature:g}, seed {RECIPE.seed}",
        }


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="A dense BERT for QA.")
@click.option("--train", required=True, type=click.Path(exists=True, path_type=Path), help="SQuAD format.")
@click.option("--dev", required=True, type=click.Path(exists=True, path_type=Path), help="SQuAD format.")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Where every stage is kept.")
@click.option("--costs", default="measured", type=click.Choice(prune.COSTS), show_default=True, help="Speed by them.")
@click.option("--limit", type=int, help="Only so many questions of both files: to see that it runs.")
@click.option("--out", type=click.Path(path_type=Path), default=record.RESULTS / "prune.csv", show_default=True)
def main(model: Path, train: Path, dev: Path, work: Path, costs: str, limit: int | None, out: Path) -> None:
    """Prune, train, evaluate."""
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    about = machine.Machine.measure(torch.get_num_threads())
    stages = Stages(model, train, work, costs)
    if limit is not None:
        stages.examples = stages.examples[:limit]
    record.write(out, rows(stages, squad.first_questions(squad.load_squad(dev), limit)), about)


if __name__ == "__main__":
    main()
