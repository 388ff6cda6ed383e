"""Published pruned structures with random weights, and timing that takes turns: what `demo` and `bench` stand on.

Speed depends on shapes, not on what was learned, so a structure with random weights is enough, and needs no network.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering

from .patch import narrow, patch_model

Key = TypeVar("Key")


@dataclass(frozen=True)
class Structure:
    """The shape of a pruned BERT for question answering.

    Attributes:
        name: for tables and options.
        heads: heads left in each layer.
        ffn_widths: FFN rows left in each layer.
        hidden_size: width of the residual stream.
        num_heads: heads of a layer before pruning; hidden_size / num_heads is the head size.
        intermediate_size: FFN rows of a layer before pruning.
        vocab_size: rows of the word embeddings.
        max_length: positions.
        pruned_heads: numbers of the heads that are gone from each layer, where they are known.
    """

    name: str
    heads: tuple[int, ...]
    ffn_widths: tuple[int, ...]
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    max_length: int = 512
    pruned_heads: tuple[tuple[int, ...], ...] = ()

    def unpruned(self) -> "Structure":
        """The model that it was pruned from."""
        layers = len(self.heads)
        return replace(
            self,
            name=f"{self.name} unpruned",
            heads=(self.num_heads,) * layers,
            ffn_widths=(self.intermediate_size,) * layers,
            pruned_heads=(),
        )

    def flops(self, batch: int, length: int) -> int:
        """Floating-point operations of a forward without padding: two for each multiply-add of a product.

        Counted are the linear layers, q k^T and probabilities times v, and the QA head; not norms, activations,
        softmax and look-ups.
        """
        tokens, head_size = batch * length, self.hidden_size // self.num_heads
        total = 2 * tokens * self.hidden_size * 2
        for heads, width in zip(self.heads, self.ffn_widths, strict=True):
            inner = heads * head_size
            total += 2 * tokens * self.hidden_size * (4 * inner + 2 * width) + 4 * tokens * length * inner
        return total


#: madlag/bert-base-uncased-squadv1-x2.44-f87.7-d26-hybrid-filled-v1.
SEED = Structure(
    "x2.44-f87.7",
    heads=(4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3),
    ffn_widths=(552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238),
    pruned_heads=(
        *((0, 2, 4, 5, 6, 7, 9, 11), (0, 2, 3, 5, 6, 7, 8, 9), (1, 2, 4, 7, 8, 11), (2, 4, 6, 7, 10)),
        *((0, 1, 2, 6, 11), (0, 1, 2, 5, 6, 7, 11), (0, 2, 3, 4, 7, 10), (1, 3, 6, 7, 11)),
        *((0, 1, 2, 3, 4, 6, 8), (1, 3, 4, 5, 7, 9, 10), (1, 4, 5, 6, 7, 8, 9), (0, 2, 3, 5, 6, 7, 8, 10, 11)),
    ),
)

#: The models that nn_pruning published for SQuAD v1 (the rows of its README, analysis/files/results_squadv1.json),
#: named by their speed-up on an RTX 3090 and their F1; and a toy for tests.
STRUCTURES: dict[str, Structure] = {
    structure.name: structure
    for structure in (
        Structure(
            "x1.84-f88.7",
            heads=(7, 5, 9, 9, 11, 10, 9, 8, 10, 6, 7, 5),
            ffn_widths=(733, 837, 992, 1013, 1053, 986, 739, 552, 309, 136, 110, 316),
        ),
        Structure(
            "x1.98-f88.3",
            heads=(7, 5, 10, 9, 11, 10, 9, 8, 10, 6, 8, 5),
            ffn_widths=(343, 490, 569, 620, 681, 642, 482, 364, 191, 74, 64, 171),
        ),
        SEED,
        Structure(
            "x2.60-f87.2",
            heads=(4, 4, 6, 7, 7, 5, 6, 7, 6, 5, 5, 3),
            ffn_widths=(268, 386, 455, 465, 543, 484, 370, 293, 172, 66, 57, 130),
        ),
        Structure(
            "x2.80-f86.7",
            heads=(4, 3, 3, 6, 4, 5, 5, 7, 3, 5, 5, 3),
            ffn_widths=(314, 460, 554, 538, 601, 573, 420, 342, 217, 74, 79, 140),
        ),
        Structure(
            "large-f91.0",
            heads=(6, 2, 2, 4, 2, 3, 2, 4, 2, 5, 10, 9, 8, 12, 10, 10, 10, 12, 9, 7, 4, 4, 2, 5),
            ffn_widths=(
                *(408, 623, 664, 823, 863, 915, 1003, 866, 961, 970, 1177, 1226),
                *(1299, 1272, 1123, 830, 685, 536, 440, 361, 175, 95, 88, 158),
            ),
            hidden_size=1024,
            num_heads=16,
            intermediate_size=4096,
        ),
        Structure(
            "large-f90.2",
            heads=(6, 2, 2, 5, 2, 2, 3, 5, 4, 6, 10, 10, 12, 12, 11, 10, 11, 11, 11, 8, 3, 5, 3, 4),
            ffn_widths=(
                *(94, 132, 140, 202, 228, 270, 297, 214, 323, 365, 486, 504),
                *(606, 576, 444, 333, 231, 180, 157, 132, 55, 38, 39, 89),
            ),
            hidden_size=1024,
            num_heads=16,
            intermediate_size=4096,
        ),
        Structure("tiny", (2, 1), (24, 9), 64, 4, 96, 211, 64),
    )
}


# ------------------------------------------------------------------------------------------------- models


def build_stock(structure: Structure, seed: int = 0, *, stored: bool = False) -> nn.Module:
    """A BertForQuestionAnswering of stock modules with these widths and random weights, in evaluation mode.

    Args:
        structure: its widths.
        seed: of the weights.
        stored: the FFN at full width, as nn_pruning's checkpoints store it: the weights of rows that are gone are
            zero, their biases and output columns are not (a constant that patching has to fold); else narrow, without
            that constant.
    """
    config = BertConfig(
        vocab_size=structure.vocab_size,
        hidden_size=structure.hidden_size,
        num_hidden_layers=len(structure.heads),
        num_attention_heads=structure.num_heads,
        intermediate_size=structure.intermediate_size,
        max_position_embeddings=structure.max_length,
        pruned_heads={layer: list(gone) for layer, gone in enumerate(structure.pruned_heads)},
    )
    with torch.device("meta"):
        model = BertForQuestionAnswering(config)
        for layer, heads, width in zip(model.bert.encoder.layer, structure.heads, structure.ffn_widths, strict=True):
            head_size = structure.hidden_size // structure.num_heads
            narrow(layer, heads, structure.intermediate_size if stored else width, head_size)
    model = model.to_empty(device="cpu").eval()
    embeddings = model.bert.embeddings
    embeddings.position_ids.copy_(torch.arange(structure.max_length)[None])
    embeddings.token_type_ids.zero_()
    _random_weights(model, structure, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _random_weights(model: Any, structure: Structure, generator: torch.Generator) -> None:
    """Weights of about the size that BERT's have; the same ones for a narrow and a stored FFN."""
    for name, parameter in model.named_parameters():
        if "intermediate.dense" not in name and not name.endswith("output.dense.weight"):
            parameter.normal_(0.9 if name.endswith("LayerNorm.weight") else 0.0, 0.05, generator=generator)
    for layer, width in zip(model.bert.encoder.layer, structure.ffn_widths, strict=True):
        up, down = layer.intermediate.dense, layer.output.dense
        attention_output = layer.attention.output.dense.weight
        attention_output.normal_(0.0, 0.05, generator=generator)
        hidden = structure.hidden_size
        for parameter, rows, columns in (
            (up.weight, width, hidden),
            (up.bias[:, None], width, 1),
            (down.weight, hidden, width),
        ):
            parameter.zero_()
            # Drawn apart and copied: normal_ on a part of a matrix draws in another order.
            parameter[:rows, :columns] = 0.05 * torch.randn(rows, columns, generator=generator)
        # From a generator of its own, so that narrow and stored models share all other weights.
        more, gone = torch.Generator().manual_seed(generator.initial_seed() + 1), up.out_features - width
        up.bias[width:] = 0.05 * torch.randn(gone, generator=more)
        down.weight[:, width:] = 0.05 * torch.randn(hidden, gone, generator=more)


class Models(NamedTuple):
    """One structure, run in three ways."""

    dense: nn.Module  # the unpruned BERT, stock
    eager: nn.Module  # the packed weights in stock modules of narrow widths, as nn_pruning's optimize_model made them
    patched: nn.Module  # the checkpoint's form, patched


def build_models(structure: Structure, backend: str = "auto") -> Models:
    """The contestants; `eager` and `patched` have the same weights.

    Raises:
        RuntimeError: a backend that cannot run here.
    """
    patched = patch_model(build_stock(structure, stored=True), keep_original=False, backend=backend)
    return Models(build_stock(structure.unpruned()), _packed_eager(structure, patched), patched)


@torch.no_grad()
def _packed_eager(structure: Structure, patched: Any) -> nn.Module:
    """Stock modules with the weights of a patched model (copies), folded constants included."""
    model: Any = build_stock(structure)
    model.qa_outputs.load_state_dict(patched.qa_outputs.state_dict())
    model.bert.embeddings.load_state_dict(patched.bert.embeddings.state_dict())
    for layer, packed in zip(model.bert.encoder.layer, patched.bert.encoder.layer, strict=True):
        own, attention = packed.weights(), layer.attention
        linears = (attention.self.query, attention.self.key, attention.self.value)
        for name, whole in zip(("weight", "bias"), own[:2], strict=True):
            for linear, part in zip(linears, whole.chunk(3), strict=True):
                getattr(linear, name).copy_(part)
        others = (attention.output.dense, attention.output.LayerNorm, layer.intermediate.dense)
        for index, module in enumerate((*others, layer.output.dense, layer.output.LayerNorm)):
            # LayerWeights: qkv, attention output and norm, up, down, output norm; a weight and a bias each.
            module.weight.copy_(own[2 * index + 2])
            module.bias.copy_(own[2 * index + 3])
    return model


# ---------------------------------------------------------------------------------------------- measuring


def random_batch(
    structure: Structure, batch: int, length: int, *, ragged: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Random ids, the same for the same seed; with `ragged`, sequences of random lengths, right-padded.

    Returns: input_ids and attention_mask, int64 [batch, length].
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((batch,), length)
    if ragged:
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    return {
        "input_ids": torch.randint(structure.vocab_size, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length)[None] < lengths[:, None]).long(),
    }


class Exactness(NamedTuple):
    """Largest differences from the stock model in float64, on the real tokens of a padded batch."""

    logits: float
    hidden_state: float


@torch.inference_mode()
def exactness(patched: nn.Module, stock: nn.Module, batch: dict[str, Tensor]) -> Exactness:
    """Compare a patched QA model with the stock one of the same weights (which is copied to float64)."""
    reference: Any = copy.deepcopy(stock).double()
    real = batch["attention_mask"].bool()

    def outputs(model: Any) -> tuple[Tensor, Tensor]:
        # Not output_hidden_states=True: a packed model then takes the reference path, and its kernels go unmeasured.
        output = model(**batch)
        hidden = model.bert(**batch).last_hidden_state
        return torch.stack([output.start_logits, output.end_logits])[:, real].double(), hidden[real].double()

    ours, exact = outputs(patched), outputs(reference)
    return Exactness(*((one - other).abs().max().item() for one, other in zip(ours, exact, strict=True)))


def interleaved(calls: Mapping[Key, Callable[[int], object]], rounds: int, warmup: int = 2) -> dict[Key, list[float]]:
    """Time calls in turns, so that a machine whose speed drifts drifts for all of them.

    Args:
        calls: each takes the number of the round, to vary its input by.
        rounds: how often each is timed.
        warmup: rounds that don't count.

    Returns: seconds, `rounds` for each.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for index in range(-warmup, rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            call(index)
            if index >= 0:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def repeated(call: Callable[[int], object], seconds: float) -> Callable[[int], object]:
    """A call that is `call`, again and again for so many seconds: what it needs is in the caches then."""

    def run(index: int) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            call(index)

    return run


@torch.inference_mode()
def race(models: Mapping[str, nn.Module], structure: Structure, batch: int, length: int, rounds: int) -> list["Result"]:
    """Time models on the same unpadded batches, in turns."""
    batches = [random_batch(structure, batch, length, seed=seed) for seed in range(3)]

    def call(model: nn.Module) -> Callable[[int], object]:
        return lambda index: model(**batches[index % len(batches)])

    seconds = interleaved({name: call(model) for name, model in models.items()}, rounds)
    return [Result(name, batch, length, *_quartiles(times)) for name, times in seconds.items()]


class Result(NamedTuple):
    """Milliseconds of one model: the median and the quartiles around it."""

    model: str
    batch: int
    length: int
    quartile_1_ms: float
    median_ms: float
    quartile_3_ms: float


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return 1e3 * low, 1e3 * median, 1e3 * high
