"""A whole model in one native call, as long as nothing that the call stands on has changed.

A forward has to know that its modules are still plain and its weights still the same: some 500 Python objects, none of
which is in the processor's caches, because all weights went through them since the last time. Asked for one by one in
Python they took longer than a layer of a short sentence. A `Shortcut` is what one forward found; the next ones compare
it with what there is now, in loops that Python runs in C.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEmbeddings

from . import dispatch
from .layers import NoNorm
from .prepack import PrepackCache, address_of

#: The modules of a BertEmbeddings: three tables and a norm.
_EMBEDDING_PARTS = ("word_embeddings", "token_type_embeddings", "position_embeddings", "LayerNorm")


def are_plain(modules: Sequence[nn.Module]) -> bool:
    """Whether calling each is calling its class's forward and nothing else."""
    if nn.modules.module._has_any_global_hook():
        return False
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
    return True


class EmbedArguments(NamedTuple):
    """What the op `embed` takes beside the ids."""

    words: Tensor
    types: Tensor
    positions: Tensor
    norm: str
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float

    @classmethod
    def of(cls, bert: Any) -> "EmbedArguments | None":
        """The model's; None where its embeddings would do something else, or native kernels do not run here."""
        embeddings = bert.embeddings
        if type(embeddings) is not BertEmbeddings:
            return None
        *tables, norm = parts = _parts(embeddings)
        if not are_plain([embeddings, *parts]) or type(norm) not in (nn.LayerNorm, NoNorm):
            return None
        if any(type(table) is not nn.Embedding or table.max_norm is not None for table in tables):
            return None
        words, types, positions, scale = (part._parameters.get("weight") for part in parts)
        kind, eps = ("no_norm", 0.0) if type(norm) is NoNorm else ("layer_norm", norm.eps)
        arguments = cls(words, types, positions, kind, scale, norm._parameters.get("bias"), eps)
        for weight in arguments.weights():
            if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != torch.float32:
                return None
        on = dispatch.resolve(bert.encoder.backend, words.device, torch.float32)
        return arguments if on == "cpu" else None

    def weights(self) -> list[Tensor]:
        """The tensors."""
        return [self.words, self.types, self.positions, self.norm_weight, self.norm_bias]


class Shortcut:
    """Embeddings and encoder of a patched BertModel as one op, for the model to keep.

    A copy of it is None: what it watches belongs to one model. It keeps the model's parameters and modules alive until
    the model makes another one, but nothing that its encoder's cache has forgotten.

    Args:
        bert: a PackedBertModel.
    """

    def __init__(self, bert: Any) -> None:
        # Before anything is made of it: what another thread changes meanwhile is a change.
        self._surroundings = dispatch.surroundings()
        self._modules = bert._modules
        embeddings, encoder = bert.embeddings, bert.encoder
        parts = _parts(embeddings)
        # Modules whose calls this one replaces.
        self._called = called = [embeddings, *parts, encoder]
        self._classes = list(map(type, called))
        self._hooks = [hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        # Items of dictionaries which have to stay the same objects, or absent.
        items = [(self._modules, name) for name in ("embeddings", "encoder")]
        for module in (*embeddings.modules(), *encoder.modules()):
            items += [(owner, name) for owner in (module._modules, module._parameters) for name in owner]
        of_calls = ("forward", "_forward_hooks", "_forward_pre_hooks")
        items += [(module.__dict__, name) for module in called for name in of_calls]
        items += [(part.__dict__, name) for part in parts for name in ("max_norm", "eps")]
        of_encoder = ("structure", "backend", "attention", "cache", "_prepacked")
        items += [(encoder.__dict__, name) for name in of_encoder]
        self._owners = [owner for owner, _ in items]
        self._names = [name for _, name in items]
        self._values = [owner.get(name) for owner, name in items]
        self._cache: PrepackCache = encoder.cache
        self._key: int | None = None  # of the encoder in it
        self._embed = EmbedArguments.of(bert)
        self._weights: list[Tensor] = []
        if self._embed is not None and are_plain([encoder]):
            self._weights = self._embed.weights()
            prepared = encoder.prepared()
            self._key = None if prepared is None else prepared.key
        # They change with dtype and device, which `Module.to` writes into the same parameters.
        self._addresses = list(map(address_of, self._weights))

    @classmethod
    def of(cls, bert: Any) -> "Shortcut | None":
        """The model's; None where its modules would do something else, or native kernels do not run here."""
        embeddings = bert.embeddings
        if type(embeddings) is not BertEmbeddings or not are_plain([embeddings, bert.encoder]):
            return None
        shortcut = cls(bert)
        return None if shortcut._key is None else shortcut

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # to pickle it, and to copy it
        return type(None), ()

    def __call__(
        self, bert: Any, input_ids: Tensor, token_type_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        """Run the model; None if it is no longer what it was.

        Args:
            bert: the model.
            input_ids: int64 [batch, length], on the CPU like the others.
            token_type_ids: the same, or None.
            attention_mask: bool or int64 [batch, length], or None.

        Returns: [batch, length, hidden_size].
        """
        prepared = self._cache.prepared
        if (
            prepared is None
            or prepared.key != self._key
            or bert._modules is not self._modules
            or not all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            or any(self._hooks)
            or list(map(type, self._called)) != self._classes
            or self._addresses != list(map(address_of, self._weights))
            or not prepared.is_current()
            or nn.modules.module._has_any_global_hook()
            or dispatch.surroundings() != self._surroundings
        ):
            return None
        assert self._embed is not None
        return torch.ops.packedbert.bert_prepared(input_ids, token_type_ids, attention_mask, *self._embed, self._key)


def _parts(embeddings: nn.Module) -> list[Any]:
    return [embeddings._modules[name] for name in _EMBEDDING_PARTS]
