"""calibrate: what a model's matrices see on a user's own data, so that int8 loses less."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from . import ops, reference
from .modules import PackedBertModel, PackedEncoder
from .patch import patch_model, unpatch_model
from .quantization import Calibration, Observed

#: Rows of each matrix's inputs that are kept to measure errors on, in all and of one batch.
KEPT_ROWS, KEPT_OF_BATCH = 256, 64

_TEXTS_AT_ONCE = 8

_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids")


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Callable[..., Mapping[str, Tensor]] | None = None,
    max_length: int = 384,
) -> Calibration:
    """Run some data through the model in float32 and note the inputs of every matrix of its BERT encoders.

    A hundred texts of the kind that the model will see are enough.

    >>> calibration = packedbert.calibrate(model, texts, tokenizer)
    >>> packedbert.patch_model(model, precision="int8", calibration=calibration)

    Args:
        model: a stock or a packed model, not in int8; it is the same afterwards.
        data: texts, or pairs of texts (question and context, say); or batches, mappings with `input_ids` and
            perhaps `attention_mask` and `token_type_ids`, [batch, length].
        tokenizer: of the model, for texts.
        max_length: texts are cut to so many tokens.

    Returns: for `PackedBertConfig(calibration=...)`.

    Raises:
        ValueError: no data, texts without a tokenizer, or an int8 model.
        TypeError: a model without a BERT encoder that packedbert knows.
    """
    stock = not any(isinstance(module, PackedBertModel) for module in model.modules())
    if stock:
        patch_model(model)
    try:
        berts = {name: module for name, module in model.named_modules() if isinstance(module, PackedBertModel)}
        observers = {name: _Observer(bert.encoder) for name, bert in berts.items()}
        for batch in _batches(data, tokenizer, max_length):
            for name, bert in berts.items():
                with torch.inference_mode(), observers[name]:
                    bert(**{key: batch[key] for key in _ARGUMENTS if key in batch})
        return {name: observer.result() for name, observer in observers.items()}
    finally:
        if stock:
            unpatch_model(model)


def _batches(
    data: Iterable[Any], tokenizer: Callable[..., Mapping[str, Tensor]] | None, max_length: int
) -> Iterator[Mapping[str, Tensor]]:
    """Batches as they are, texts tokenized a few at a time; with a progress bar."""
    from rich.console import Console
    from rich.progress import track

    found = False
    items: Any = [data] if isinstance(data, str) else data
    texts_at_hand: list[Any] = []

    def tokenized() -> Mapping[str, Tensor]:
        if tokenizer is None:
            raise ValueError("calibrate: expected a tokenizer with texts, got None; or pass batches of input_ids")
        pairs = [(text,) if isinstance(text, str) else tuple(text) for text in texts_at_hand]
        columns = [list(column) for column in zip(*pairs, strict=True)]
        texts_at_hand.clear()
        return tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")

    total = len(items) if isinstance(items, Sequence) else None
    for item in track(items, "calibrating", total=total, console=Console(stderr=True), transient=True):
        found = True
        if isinstance(item, Mapping) or hasattr(item, "input_ids"):
            yield item
            continue
        texts_at_hand.append(item)
        if len(texts_at_hand) == _TEXTS_AT_ONCE:
            yield tokenized()
    if texts_at_hand:
        yield tokenized()
    if not found:
        raise ValueError("calibrate: expected texts or batches, got none")


class _Observer:
    """While entered, an encoder runs layer by layer in float32, and the inputs of its matrices are noted."""

    def __init__(self, encoder: PackedEncoder) -> None:
        if any("int8" in layer for layer in encoder.precisions()):
            raise ValueError(
                "calibrate: expected a model in a floating precision, got one in int8: its original is needed"
            )
        self.encoder = encoder
        # PyTorch's own product compiles anew for every number of tokens, which takes longer than to run it.
        self.weights = [
            ops.prepack_linear(weight.float()) if weight.dim() == 2 else weight.float() for weight in encoder.weights()
        ]
        self.largest: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = defaultdict(list)

    def __enter__(self) -> None:
        self.encoder.forward = self._forward  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        del self.encoder.forward

    def _forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: object) -> Any:
        structure = self.encoder.structure
        # reference.layer calls `linear` for these, in this order.
        names = (f"{layer}.{name}" for layer in itertools.count() for name in reference.MATRICES)

        def linear(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._note(next(names), input)
            return ops.packed_linear(input, *args, **kwargs)

        output = ops.run_layers(
            hidden_states.float(),
            None if attention_mask is None else attention_mask != 0,
            self.weights,
            [len(layer.heads) for layer in structure.layers],
            structure.activation,
            structure.norm,
            structure.eps,
            "fp32",
            linear,
        )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output.to(hidden_states.dtype))

    def _note(self, name: str, rows: Tensor) -> None:
        if not len(rows):
            return
        largest = rows.abs().amax(0)
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest
        self.rows[name].append(rows[:: -(-len(rows) // KEPT_OF_BATCH)].clone())

    def result(self) -> dict[str, Observed]:
        """What was noted."""
        observed = {}
        for name, largest in self.largest.items():
            rows = torch.cat(self.rows[name])
            observed[name] = Observed(largest.clone(), rows[:: -(-len(rows) // KEPT_ROWS)].clone())
        return observed
