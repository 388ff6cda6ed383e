"""What no kernel takes off a call: being called as a model of transformers is, and reading the encoder's weights.

Timed in turns with the peers, so under the same conditions. With cold caches the two add up: the first weight isn't
asked for before the call, and nothing is returned before the last.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from peers import Peer, Runner, torch_runner
from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput

import packedbert


class Answered(nn.Module):
    """In the place of a BertForQuestionAnswering: hands out logits that are there already."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[torch.Size, QuestionAnsweringModelOutput] = {}

    def forward(self, input_ids: Tensor, **_: Any) -> QuestionAnsweringModelOutput:
        """Random logits [batch, length], the same for all calls of a shape."""
        shape = input_ids.shape
        if shape not in self.answers:
            start, end = torch.randn(2, *shape)
            self.answers[shape] = QuestionAnsweringModelOutput(start_logits=start, end_logits=end)
        return self.answers[shape]


def calling(_: nn.Module) -> Runner:
    """A module that has nothing to do."""
    return torch_runner(Answered())


def reading(model: nn.Module, precision: str) -> Runner:
    """Every byte of the packed matrices once, on all threads: a sum of them as int64."""
    patched: Any = packedbert.patch_model(
        copy.deepcopy(model), precision=precision, keep_original=False, release_weights=True
    )
    weights = [part.weight for part in patched.bert.encoder.matrices().values()]
    storage = weights[0].untyped_storage()
    if storage.nbytes() < sum(weight.nbytes for weight in weights):
        raise RuntimeError("expected all matrices in one piece of memory, as the native kernels' are")
    words = torch.empty(0, dtype=torch.int64).set_(storage, 0, (storage.nbytes() // 8,))

    def run(_ids: Tensor, _mask: Tensor) -> list[Tensor]:
        return [words.sum()]

    return run


def build(model: nn.Module) -> dict[Peer, Runner]:
    """All floors of a stock BertForQuestionAnswering."""
    peers = [Peer("calling the model", "any", calling)]
    peers += [Peer("reading its weights", name, partial(reading, precision=name)) for name in ("fp32", "int8")]
    return {peer: peer.build(model) for peer in peers}
