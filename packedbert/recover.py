"""recover_model: train what pruning left, with the dense model as the teacher; interrupted, it goes on where it was.

The recipe is that of the seed model's card: the loss is 0.9 of the teacher's (Hinton et al. 2015, arXiv 1503.02531,
temperature 2) and 0.1 of the labels'. What is trained is a copy in stock modules of the widths that are left.
"""

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import examples
from .patch import dense_layers, patch_model
from .prune import Kept, only_bert
from .structure import plan_layer

#: Batches are as long as a multiple of this: PyTorch compiles its products anew for every length.
_LENGTHS = 32

#: Steps between two looks at the clock, to save or to stop.
_LOOK_EVERY = 10


@dataclass(frozen=True)
class Recipe:
    """How a pruned model is trained.

    Attributes:
        epochs: passes over the examples.
        batch_size: examples of a step; they are of about one length.
        learning_rate: at its highest, after the warm-up; it falls linearly to 0 (AdamW).
        warm_up: share of the steps in which it rises.
        weight_decay: of AdamW, on matrices.
        alpha: share of the teacher's loss.
        temperature: of the softmax that teacher and student are compared at.
        dropout: everywhere in the student while it is trained; a teacher regularizes too, and drawing takes time.
        seed: of the order and of dropout.
        bfloat16: compute products in bfloat16 (weights stay in float32): twice as fast where the processor has it.
    """

    epochs: float = 3.0
    batch_size: int = 16
    learning_rate: float = 1e-4
    warm_up: float = 0.05
    weight_decay: float = 0.01
    alpha: float = 0.9
    temperature: float = 2.0
    dropout: float = 0.0
    seed: int = 0
    bfloat16: bool = False


def recover_model(
    model: nn.Module,
    teacher: nn.Module,
    data: Sequence[examples.Example],
    recipe: Recipe | None = None,
    *,
    minutes: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    save_every: float = 5.0,
    progress: Callable[[int, int, float], object] | None = None,
) -> nn.Module:
    """Train a pruned model in place, heads and FFN rows that are gone stay so.

    Args:
        model: from prune_model, or any stock model with zero heads and rows (a dense one is trained whole).
        teacher: the dense model; stock or patched.
        data: labelled examples.
        recipe: `Recipe()` if None.
        minutes: stop after so much training, with the learning rate brought down by then: the first steps show how
            many will fit, at most the recipe's epochs.
        folder: where to keep the state, every `save_every` minutes and when interrupted; what is there already is
            gone on with.
        save_every: minutes.
        progress: called with (steps done, in all, mean loss of late).

    Returns: the same model, in evaluation mode.

    Raises:
        ValueError: no data, a model that is packed, a saved state of another recipe or model, a loss that is not
            finite.
        OSError: the folder can't be written; found out before anything is trained.
        KeyboardInterrupt: after the state was saved; the model is as it was.
    """
    recipe = recipe or Recipe()
    examples.check(data)
    bert = only_bert(model)
    kept = _kept(bert)
    state_file = None if folder is None else _state_file(folder)
    torch.manual_seed(recipe.seed)
    training = _Training(_narrow(model, kept), _patched(teacher), data, recipe, bert.config)
    if state_file is not None and state_file.exists():
        training.load(state_file)
    try:
        training.run(minutes, state_file, save_every, progress)
    except KeyboardInterrupt:
        if state_file is not None:
            training.save(state_file)
        raise
    if state_file is not None:
        training.save(state_file)
    _write_back(model, training.student, kept)
    return model.eval()


def _state_file(folder: str | os.PathLike[str]) -> Path:
    """In a folder that can be written to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".write-test"
    probe.touch()
    probe.unlink()
    return folder / "recovery.pt"


class _Training:
    """Student, teacher, optimizer, and where they are."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, data: Sequence[examples.Example], recipe: Recipe, config: Any
    ) -> None:
        self.student, self.teacher, self.data, self.recipe = student, teacher, data, recipe
        self.pad, self.positions = config.pad_token_id or 0, config.max_position_embeddings
        decayed = [parameter for parameter in student.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in student.parameters() if parameter.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            foreach=True,
        )
        self.batches = -(-len(data) // recipe.batch_size)
        self.step, self.steps, self.seconds = 0, max(1, round(recipe.epochs * self.batches)), 0.0
        self.recent = 0.0  # mean loss of the last steps

    def run(
        self,
        minutes: float | None,
        state_file: Path | None,
        save_every: float,
        progress: Callable[[int, int, float], object] | None,
    ) -> None:
        """All steps that are left."""
        self.student.train()
        for module in self.student.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.recipe.dropout
        saved = last = time.perf_counter()
        while self.step < self.steps:
            epoch, first = divmod(self.step, self.batches)
            for batch in self._epoch(epoch)[first:]:
                part = [self.data[index] for index in batch]
                self._train_step(examples.collate(part, self.pad, _LENGTHS, self.positions))
                now = time.perf_counter()
                self.seconds, last = self.seconds + now - last, now
                if self.step % _LOOK_EVERY == 0:
                    if minutes is not None and self.seconds > 0.02 * 60 * minutes:
                        # Steps differ in length, so the estimate is renewed; the learning rate follows it.
                        fitting = int(self.step * 60 * minutes / self.seconds)
                        self.steps = max(self.step, min(round(self.recipe.epochs * self.batches), fitting))
                    if state_file is not None and now - saved > 60 * save_every:
                        self.save(state_file)
                        saved = now
                if progress is not None:
                    progress(self.step, self.steps, self.recent)
                if self.step >= self.steps:
                    return

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, in its order: random, but of about one length each."""
        random = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        lengths = torch.tensor([float(len(example["input_ids"])) for example in self.data])
        by_length = (lengths + 8 * torch.rand(len(lengths), generator=random)).argsort().tolist()
        size = self.recipe.batch_size
        batches = [by_length[first : first + size] for first in range(0, len(by_length), size)]
        return [batches[index] for index in torch.randperm(len(batches), generator=random).tolist()]

    def _train_step(self, batch: dict[str, Tensor]) -> None:
        recipe = self.recipe
        rate = recipe.learning_rate * min(
            (self.step + 1) / max(1.0, recipe.warm_up * self.steps),
            (self.steps - self.step) / max(1.0, self.steps * (1 - recipe.warm_up)),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = max(0.0, rate)
        half = torch.autocast("cpu", torch.bfloat16) if recipe.bfloat16 else nullcontext()
        with half:
            output = self.student(**batch)
        loss = (1 - recipe.alpha) * output.loss.float()
        if recipe.alpha:
            labels = ("labels", "start_positions", "end_positions")
            with torch.no_grad():
                wanted = self.teacher(**{name: value for name, value in batch.items() if name not in labels})
            loss = loss + recipe.alpha * distillation_loss(
                output, wanted, batch.get("attention_mask"), recipe.temperature
            )
        if not torch.isfinite(loss):
            raise ValueError(
                f"step {self.step}: expected a finite loss, got {loss.item()}; lower the learning rate "
                f"({recipe.learning_rate:g})"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.step += 1
        self.recent += (loss.item() - self.recent) * max(0.02, 1 / self.step)

    def save(self, file: Path) -> None:
        """The state, whole or not at all."""
        state = {
            "recipe": asdict(self.recipe),
            "examples": len(self.data),
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            **{name: getattr(self, name) for name in ("step", "steps", "seconds", "recent")},
        }
        torch.save(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def load(self, file: Path) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another recipe, other examples, or another model.
        """
        state = torch.load(file, weights_only=True)
        advice = "delete it, or name another folder, to start anew"
        for name, own in (("recipe", asdict(self.recipe)), ("examples", len(self.data))):
            if state[name] != own:
                raise ValueError(f"{file}: expected a state of {name} {own}, got one of {state[name]}; {advice}")
        try:
            self.student.load_state_dict(state["student"])
        except RuntimeError as error:
            raise ValueError(f"{file}: expected a state of this pruned model, got another's; {advice}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        for name in ("step", "steps", "seconds", "recent"):
            setattr(self, name, state[name])


def distillation_loss(
    student: Mapping[str, Any], teacher: Mapping[str, Any], attention_mask: Tensor | None, temperature: float
) -> Tensor:
    """temperature^2 * KL(teacher || student), the mean over examples and over the outputs' logits.

    Args:
        student, teacher: model outputs. All fields named ...logits count: [batch, length] of start_logits and
            end_logits, over the real tokens; [batch, classes]; [batch, length, classes], the mean over real tokens.
        attention_mask: [batch, length], or None.
        temperature: that both are divided by.

    Raises:
        ValueError: there are no logits.
    """
    losses = []
    for name in (name for name in student if name.endswith("logits")):
        ours, wanted = student[name].float() / temperature, teacher[name].float() / temperature
        real = None if attention_mask is None else attention_mask != 0
        spans = name in ("start_logits", "end_logits")
        if spans and real is not None:
            ours, wanted = ours.masked_fill(~real, -1e4), wanted.masked_fill(~real, -1e4)
        apart = nn.functional.kl_div(ours.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True)
        apart = apart.sum(-1)
        losses.append(apart[real].mean() if apart.dim() == 2 and real is not None else apart.mean())
    if not losses:
        raise ValueError(f"expected outputs with logits to compare, got {', '.join(student)}")
    return temperature**2 * torch.stack(losses).mean()


# ------------------------------------------------------------------------------------------- narrow, and back


def _kept(bert: Any) -> list[Kept]:
    """What is not zero. Stock modules can't run without any head, so one stays."""
    structure, layers = dense_layers(bert)
    kept = []
    for layer in layers:
        plan = plan_layer(layer, structure.head_size)
        kept.append(Kept(plan.heads or (0,), plan.ffn_rows))
    return kept


@torch.no_grad()
def _narrow(model: nn.Module, kept: Sequence[Kept]) -> Any:
    """A copy in stock modules of the widths that are left, to train."""
    narrow = copy.deepcopy(model).float()
    for layer, plan in zip(only_bert(narrow).encoder.layer, kept, strict=True):
        for place, rows, columns in _places(layer, plan):
            wide = layer.get_submodule(place)
            weight = wide.weight[rows][:, columns]
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.weight.copy_(weight)
            linear.bias.copy_(wide.bias[rows])
            layer.set_submodule(place, linear)
        attention = layer.attention.self
        attention.num_attention_heads = len(plan.heads)
        attention.all_head_size = attention.query.out_features
    return narrow.requires_grad_(True)


@torch.no_grad()
def _write_back(model: nn.Module, narrow: nn.Module, kept: Sequence[Kept]) -> None:
    """The trained weights, to where they are in the model."""
    layers, trained = only_bert(model).encoder.layer, only_bert(narrow).encoder.layer
    inside = set()
    for index, (layer, plan) in enumerate(zip(layers, kept, strict=True)):
        for place, rows, columns in _places(layer, plan):
            linear, whole = trained[index].get_submodule(place), layer.get_submodule(place)
            whole.weight[rows[:, None], columns] = linear.weight.to(whole.weight.dtype)
            whole.bias[rows] = linear.bias.to(whole.bias.dtype)
            inside.add(id(whole.weight))
            inside.add(id(whole.bias))
    own = dict(narrow.named_parameters())
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            parameter.copy_(own[name])


def _places(layer: Any, plan: Kept) -> list[tuple[str, Tensor, Tensor]]:
    """Of a stock layer's linear modules: name, and which of their rows and columns a plan keeps."""
    size = layer.attention.self.attention_head_size
    hidden = torch.arange(layer.attention.output.dense.out_features)
    inner = (torch.tensor(plan.heads)[:, None] * size + torch.arange(size)).flatten()
    rows = torch.tensor(plan.ffn_rows, dtype=torch.long)
    return [
        *((f"attention.self.{name}", inner, hidden) for name in ("query", "key", "value")),
        ("attention.output.dense", hidden, inner),
        ("intermediate.dense", rows, hidden),
        ("output.dense", hidden, rows),
    ]


def _patched(teacher: nn.Module) -> nn.Module:
    """A patched copy: the teacher only has to answer, so it may as well be fast."""
    if getattr(teacher, "packedbert_report", None) is not None:
        return teacher
    return patch_model(copy.deepcopy(teacher), keep_original=False)
