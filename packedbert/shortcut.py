"""A whole model in one native call, as long as nothing that the call stands on has changed.

A forward has to know that its modules are still plain and its weights still the same: some 500 Python objects, none of
which is in the processor's caches, because all weights went through them since the last time. Asked for one by one in
Python they took longer than a layer of a short sentence. A `Shortcut` is what one forward found; the next ones compare
it with what there is now, in loops that run in C.
"""

import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEmbeddings

from . import dispatch, ops
from .layers import NoNorm
from .prepack import PrepackCache, PreparedEncoder, address_of

#: The modules of a BertEmbeddings: three tables and a norm.
_EMBEDDING_PARTS = ("word_embeddings", "token_type_embeddings", "position_embeddings", "LayerNorm")

#: What a config may ask of every forward, and what a Shortcut does. `output_attentions` is a property in some versions
#: of transformers, of an attribute with an underscore.
_OPTIONS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
_OPTION_ATTRIBUTES = (*_OPTIONS, "_output_attentions", "max_position_embeddings")


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
    """A patched BertModel, embeddings and encoder, and perhaps an output layer as one op, for the model to keep.

    A copy of it is None: what it watches belongs to one model. It keeps the model's parameters and modules alive until
    the model makes another one, but nothing that its encoder's cache has forgotten.

    Args:
        bert: a PackedBertModel.
        model: that, or a model that consists of it, as `bert`, and an output layer.
        head: the name of that layer, an nn.Linear with a bias.
    """

    def __init__(self, bert: Any, model: nn.Module, head: str | None = None) -> None:
        # Before anything is made of it: what another thread changes meanwhile is a change.
        self._isa = dispatch.cpu_isa()
        self._modules = model._modules
        self._owners: list[dict[Any, Any]] = []
        self._names: list[Any] = []
        self._values: list[Any] = []
        embeddings, encoder = bert.embeddings, bert.encoder
        parts = _parts(embeddings)
        # Modules whose calls this one replaces.
        self._called = called = [embeddings, *parts, encoder]
        output: Any = None
        if head is not None:
            output = model._modules[head]
            called += [bert, output]
            self._watch(model._modules, "bert", head)
            self._watch(output._parameters, "weight", "bias")
        self._classes = list(map(type, called))
        self._hooks = [hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._watch(bert._modules, "embeddings", "encoder")
        for module in (*embeddings.modules(), *encoder.modules()):
            self._watch(module._modules, *module._modules)
            self._watch(module._parameters, *module._parameters)
        for module in called:
            self._watch(module.__dict__, "forward", "_forward_hooks", "_forward_pre_hooks")
        for part in parts:
            self._watch(part.__dict__, "max_norm", "eps")
        self._watch(encoder.__dict__, "structure", "backend", "attention", "cache", "_prepacked")
        for owner in (bert,) if model is bert else (bert, model):
            self._watch(owner.__dict__, "_modules", "config")
            self._watch(owner.config.__dict__, *_OPTION_ATTRIBUTES)
        self._watch(os.environ._data, *map(os.environ.encodekey, dispatch.VARIABLES))  # type: ignore[attr-defined]

        self._cache: PrepackCache = encoder.cache
        self._encoder_key = 0
        #: Of the op `bert_prepared`; None: the modules would do something else.
        self.key: int | None = None
        # They change with dtype and device, which `Module.to` writes into the same parameters.
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []
        embed = EmbedArguments.of(bert)
        if embed is not None and are_plain(called) and _asks_for_nothing(model, bert, embed):
            self._weights = embed.weights()
            if output is not None:
                self._weights += [output.weight, output.bias]
            self._addresses = list(map(address_of, self._weights))
            self._prepare(encoder, embed)

    @classmethod
    def of(cls, bert: Any, model: nn.Module, head: str | None = None) -> "Shortcut | None":
        """The model's; None where its modules would do something else, or native kernels do not run here."""
        modules = [bert.embeddings, bert.encoder]
        if head is not None:
            output: Any = model._modules[head]
            if type(output) is not nn.Linear or output.bias is None:
                return None
            modules += [bert, output]
        if type(bert.embeddings) is not BertEmbeddings or not are_plain(modules):
            return None
        shortcut = cls(bert, model, head)
        return None if shortcut.key is None else shortcut

    def _watch(self, owner: dict[str, Any], *names: Any) -> None:
        """Items of a dictionary that have to stay the same objects, or absent."""
        self._owners += [owner] * len(names)
        self._names += names
        self._values += [owner.get(name) for name in names]

    def _prepare(self, encoder: Any, embed: EmbedArguments) -> None:
        for weight in self._weights:
            if weight.dtype != torch.float32 or not weight.is_cpu or not weight.is_contiguous():
                return
        prepared = encoder.prepared()
        if prepared is None:
            return
        # Tensors that nobody else has, so that the model's own can be swapped (torch.utils.swap_tensors). They own the
        # storage, so that no address comes back as another weight's.
        words, types, positions, *norm_and_head = (weight.detach() for weight in self._weights)
        norm, head = norm_and_head[:2], norm_and_head[2:] or (None, None)
        self._encoder_key = prepared.key
        self.key = torch.ops.packedbert.prepare_bert(
            words, types, positions, embed.norm, *norm, embed.eps, prepared.key, *head
        )
        assert dispatch.NATIVE is not None  # it has the op
        weakref.finalize(self, dispatch.NATIVE.release_bert, self.key)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # to pickle it, and to copy it
        return type(None), ()

    def current(self, model: nn.Module) -> PreparedEncoder | None:
        """The encoder that `key` stands on, which has to be held as long as it is used; None if the model changed.

        Args:
            model: that of this Shortcut, or what took it over with all its attributes.
        """
        prepared = self._cache.prepared
        assert dispatch.NATIVE is not None
        if (
            prepared is None
            or prepared.key != self._encoder_key
            or model._modules is not self._modules
            or not dispatch.NATIVE.are_same(self._owners, self._names, self._values)
            or any(self._hooks)
            or list(map(type, self._called)) != self._classes
            or self._addresses != list(map(address_of, self._weights))
            or not prepared.is_current()
            or nn.modules.module._has_any_global_hook()
            or dispatch.cpu_isa() != self._isa
        ):
            return None
        return prepared


def run(
    model: Any, input_ids: Tensor, token_type_ids: Tensor | None, attention_mask: Tensor | None
) -> list[Tensor] | None:
    """A model's forward in one native call, with options as its config has them.

    Args:
        model: keeps a Shortcut as `_shortcut`, and makes one by `find_shortcut()`.
        input_ids: [batch, length].
        token_type_ids: the same, or None.
        attention_mask: [batch, length], or None.

    Returns: the last hidden states [batch, length, hidden_size]; or, of a model with a head, each of its outputs,
        [batch, length]. None where the modules would do something else, or have to say what is wrong with the inputs.
    """
    if ops.is_recorded() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.vmap: tensors without an address
        return None
    for tensor in (input_ids, token_type_ids, attention_mask):
        if tensor is not None and type(tensor) is not Tensor:
            return None
    shortcut: Shortcut | None = model._shortcut
    held = None if shortcut is None else shortcut.current(model)
    if held is None:
        model._shortcut = shortcut = model.find_shortcut()
        held = None if shortcut is None else shortcut.current(model)
    if shortcut is None or held is None:
        return None
    try:
        return torch.ops.packedbert.bert_prepared(input_ids, token_type_ids, attention_mask, shortcut.key)
    except RuntimeError:
        return None


def _asks_for_nothing(model: Any, bert: Any, embed: EmbedArguments) -> bool:
    """Whether the configs leave a forward's options as a Shortcut has them, and the op refuses what is too long."""
    plain = all(getattr(owner.config, name) is value for owner in (model, bert) for name, value in _OPTIONS.items())
    return plain and embed.positions.shape[0] <= bert.config.max_position_embeddings


def _parts(embeddings: nn.Module) -> list[Any]:
    return [embeddings._modules[name] for name in _EMBEDDING_PARTS]
