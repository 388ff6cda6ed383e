"""What no kernel takes off a call: transformers' own work around the encoder, and reading the encoder's weights.

Timed in turns with the peers, so under the same conditions. With cold caches the two add up: the Python before the
encoder has to be done before its first weight is asked for, and the head needs its last result.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from peers import Peer, Runner, torch_runner
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

import packedbert


class NoEncoder(nn.Module):
    """In the place of a BertModel: hands out hidden states that are there already."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.states: dict[torch.Size, Tensor] = {}

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Random numbers [batch, length, hidden_size], the same for all calls of a shape."""
        if input_ids.shape not in self.states:
            self.states[input_ids.shape] = torch.randn(*input_ids.shape, self.hidden_size)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=self.states[input_ids.shape])


def around(model: nn.Module) -> Runner:
    """The model without its BertModel."""
    rest: Any = copy.deepcopy(model)
    rest.bert = NoEncoder(rest.config.hidden_size)
    return torch_runner(rest)


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
    peers = [Peer("around the encoder", "any", around)]
    peers += [Peer("reading its weights", name, partial(reading, precision=name)) for name in ("fp32", "int8")]
    return {peer: peer.build(model) for peer in peers}
