"""A whole model in one native call, as long as nothing that the call stands on has changed.

A forward has to know that its modules are still plain and its weights still the same: some 500 Python objects, none of
which is in the processor's caches, because all weights went through them since the last time. Asked for one by one in
Python they took longer than a layer of a short sentence. A `Shortcut` is what one forward found; the next ones compare
it with what there is now, in loops that run in C.
"""

import operator
import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.models.bert.modeling_bert import BertEmbeddings

from . import dispatch, ops
from .layers import NoNorm
from .prepack import PrepackCache, PreparedEncoder, address_of

#: The modules of a BertEmbeddings: three tables and a norm.
_EMBEDDING_PARTS = ("word_embeddings", "token_type_embeddings", "position_embeddings", "LayerNorm")

#: What a config may ask of every forward, and what a Shortcut does. `output_attentions` is a property in some versions
#: of transformers, of an attribute with an underscore.
OPTIONS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
_OPTION_ATTRIBUTES = (*OPTIONS, "_output_attentions", "max_position_embeddings")

_FORWARD = operator.attrgetter("forward")

#: What these classes do, as long as nobody has given them another forward.
_FORWARDS = {kind: kind.forward for kind in (BertEmbeddings, nn.Embedding, nn.LayerNorm, nn.Linear)}


def are_plain(modules: Sequence[nn.Module]) -> bool:
    """Whether calling each is calling the forward that its class came with and nothing else."""
    if nn.modules.module._has_any_global_hook():
        return False
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
        kind = type(module)
        if kind.forward is not _FORWARDS.get(kind, kind.forward):
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
    the model makes another one, but nothing that its encoder's cache has forgotten. It does not refer to the model, so
    that there is no cycle.

    Args:
        bert: a PackedBertModel.
        model: that, or a model that consists of it, as `bert`, and an output layer.
        head: the name of that layer.
    """

    def __init__(self, bert: Any, model: Any, head: str | None = None) -> None:
        # Before anything is made of it: what another thread changes meanwhile is a change.
        self._isa = dispatch.cpu_isa()
        self._modules, self._config = model._modules, model.config
        self._owners: list[dict[Any, Any]] = []
        self._names: list[Any] = []
        self._values: list[Any] = []
        embeddings, encoder = bert.embeddings, bert.encoder
        inside = [*embeddings.modules(), *encoder.modules()]
        # Modules whose calls this one replaces.
        self._called = called = [embeddings, *_parts(embeddings), encoder]
        if head is not None:
            called += [bert, model._modules[head]]
            inside.append(model._modules[head])
            self._watch(model._modules, "bert", head)
            self._watch(bert.__dict__, "_modules", "config")
        self._classes = list(map(type, called))
        self._forwards = list(map(_FORWARD, self._classes))
        self._hooks = [hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._watch(bert._modules, "embeddings", "encoder")
        for module in inside:
            self._watch(module.__dict__, "_modules", "_parameters")
            self._watch(module._modules, *module._modules)
            self._watch(module._parameters, *module._parameters)
        for module in called:
            self._watch(module.__dict__, "forward", "_forward_hooks", "_forward_pre_hooks")
        for part in _parts(embeddings):
            self._watch(part.__dict__, "max_norm", "eps")
        self._watch(encoder.__dict__, "structure", "backend", "attention", "cache", "_prepacked")
        for config in (bert.config, model.config):
            self._watch(config.__dict__, *_OPTION_ATTRIBUTES)
        self._watch(os.environ._data, *map(os.environ.encodekey, dispatch.VARIABLES))  # type: ignore[attr-defined]
        # Whose items are watched, all of them: none may be added.
        self._complete = [owner for module in inside for owner in (module._modules, module._parameters)]
        self._size = sum(map(len, self._complete))

        self._cache: PrepackCache = encoder.cache
        self._encoder_key = 0
        #: Of the op `bert_prepared`; None: the modules would do something else.
        self.key: int | None = None
        self._weights = _weights_of(bert, model, head) or []
        # They change with dtype and device, which `Module.to` writes into the same parameters.
        self._addresses, self._shapes = list(map(address_of, self._weights)), _shapes(self._weights)
        if self._weights:
            self._prepare(bert)

    @classmethod
    def of(cls, bert: Any, model: Any, head: str | None = None) -> "Shortcut | None":
        """The model's; None where its modules would do something else, or native kernels do not run here."""
        if _weights_of(bert, model, head) is None:  # far cheaper than to find out on the way
            return None
        shortcut = cls(bert, model, head)
        return None if shortcut.key is None else shortcut

    def _watch(self, owner: dict[Any, Any], *names: Any) -> None:
        """Items of a dictionary that have to stay the same objects, or absent."""
        self._owners += [owner] * len(names)
        self._names += names
        self._values += [owner.get(name) for name in names]

    def _prepare(self, bert: Any) -> None:
        embed, prepared = EmbedArguments.of(bert), bert.encoder.prepared()
        if embed is None or prepared is None:
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
            or model.__dict__.get("config") is not self._config
            or not dispatch.NATIVE.are_same(self._owners, self._names, self._values)
            or any(self._hooks)
            or dispatch.NATIVE.total_size(self._complete) != self._size
            or list(map(type, self._called)) != self._classes
            or list(map(_FORWARD, self._classes)) != self._forwards
            or list(map(address_of, self._weights)) != self._addresses
            or _shapes(self._weights) != self._shapes
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
    if forward_ad._current_level >= 0:  # which no_grad leaves on
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.vmap: tensors without an address
        return None
    for tensor in (input_ids, token_type_ids, attention_mask):
        if tensor is not None and type(tensor) is not Tensor:
            return None
    # The op would refuse them too, but these are not rare, and an exception costs more.
    if input_ids.dtype != torch.int64 or (attention_mask is not None and attention_mask.dim() != 2):
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


def _weights_of(bert: Any, model: Any, head: str | None) -> list[Tensor] | None:
    """What `Shortcut` hands over beside the encoder; None where the modules would do something else than the op."""
    embed = EmbedArguments.of(bert)
    if embed is None or not are_plain([bert.encoder]):
        return None
    weights = embed.weights()
    hidden_size = bert.config.hidden_size
    if head is not None:
        output = model._modules.get(head)
        if type(output) is not nn.Linear or not are_plain([bert, output]):
            return None
        weight, bias = output._parameters.get("weight"), output._parameters.get("bias")
        if weight is None or bias is None or bias.dim() != 1 or weight.shape != (len(bias), hidden_size):
            return None
        weights += [weight, bias]
    if any(getattr(owner.config, name) is not value for owner in (bert, model) for name, value in OPTIONS.items()):
        return None
    if embed.positions.shape[0] > bert.config.max_position_embeddings:  # the op refuses what is longer than the table
        return None
    return weights if all(map(_is_readable, weights)) else None


def _is_readable(weight: Tensor) -> bool:
    """Whether native code finds there what the tensor says."""
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != torch.float32 or not weight.is_cpu:
        return False
    if weight.layout != torch.strided or weight.is_neg() or not weight.is_contiguous():
        return False
    end = weight.storage_offset() + weight.numel()
    return end * weight.element_size() <= weight.untyped_storage().nbytes()


def _shapes(weights: list[Tensor]) -> list[Any]:
    return [*map(Tensor.size, weights), *map(Tensor.is_contiguous, weights)]


def _parts(embeddings: nn.Module) -> list[Any]:
    return [embeddings._modules[name] for name in _EMBEDDING_PARTS]
