"""The modules that patch.py installs: parameters in packed form, and a forward that only calls ops.

    PackedBertModel  stands in for a BertModel: checks its arguments, embeds, calls the encoder, pools
      PackedEncoder  the layers; one `encoder` op a forward
        PackedLayer  the parameters of one layer, canonical and of exact width

Parameter names and shapes are those of a packed checkpoint (see `reference.LayerWeights` for the shapes).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert.modeling_bert import BertEmbeddings

from . import dispatch, ops, reference
from .config import PackedBertConfig
from .reference import LayerWeights
from .structure import EncoderStructure


class WeightAndBias(nn.Module):
    """A weight and a bias without a gradient; what they are for, the parent knows."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def extra_repr(self) -> str:  # noqa: D102
        return f"weight={list(self.weight.shape)}, bias={list(self.bias.shape)}"


class NoNorm(WeightAndBias):
    """nn_pruning's replacement of LayerNorm: x * weight + bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift [..., hidden_size]."""
        return reference.normalize(x, "no_norm", self.weight, self.bias, 0.0)


class PrepackedLinear(WeightAndBias):
    """A linear layer's parameters with the weight as the native CPU kernels read it, and no canonical copy.

    `weight` has the layout of `ops.prepack_linear`; `state_dict` and `load_state_dict` have the canonical one.
    """

    def __init__(self, linear: WeightAndBias) -> None:
        super().__init__(ops.prepack_linear(linear.weight.detach()), linear.bias.detach())

    def canonical_weight(self) -> Tensor:
        """[out_features, in_features], rebuilt bit for bit."""
        return self.weight.detach().transpose(1, 2).flatten(0, 1)[: self.bias.shape[0]].contiguous()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.canonical_weight()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        canonical = state_dict.get(f"{prefix}weight")
        if canonical is not None:
            packed = ops.prepack_linear(canonical.to(device=self.weight.device, dtype=self.weight.dtype))
            state_dict[f"{prefix}weight"] = packed  # load_state_dict has made a copy of the caller's
        super()._load_from_state_dict(state_dict, prefix, *args)


class PackedLayer(nn.Module):
    """The parameters of one packed layer."""

    def __init__(self, weights: LayerWeights) -> None:
        super().__init__()
        for name, weight, bias in zip(_PARTS, weights[::2], weights[1::2], strict=True):
            self.add_module(name, WeightAndBias(weight, bias))

    def stored_weights(self) -> list[Tensor]:
        """The parameters as they are stored, in the order of `LayerWeights` (nn.Module's own look-up is slower)."""
        return [tensor for part in self._modules.values() for tensor in part._parameters.values()]  # type: ignore[union-attr,misc]

    def weights(self) -> list[Tensor]:
        """The fields of `LayerWeights`, in their order."""
        tensors: list[Tensor] = []
        for part in self.children():
            assert isinstance(part, WeightAndBias)
            tensors += (part.canonical_weight() if isinstance(part, PrepackedLinear) else part.weight, part.bias)
        return tensors

    def release_weights(self) -> None:
        """Make every linear layer a PrepackedLinear."""
        for name in _MATRICES:
            setattr(self, name, PrepackedLinear(getattr(self, name)))


#: The child modules of a PackedLayer: `qkv`, `attention_output`, ... in the order of `LayerWeights`.
_PARTS = [name.removesuffix("_weight") for name in LayerWeights._fields[::2]]
_MATRICES = [name for name in _PARTS if not name.endswith("norm")]


class PackedEncoder(nn.Module):
    """All layers of a packed encoder, in place of transformers' BertEncoder.

    Args:
        structure: widths, activation and norm.
        layers: the weights of each layer; None makes empty ones on the meta device, for a checkpoint to fill.
        config: which backend to run on.
    """

    def __init__(
        self, structure: EncoderStructure, layers: list[LayerWeights] | None, config: PackedBertConfig
    ) -> None:
        super().__init__()
        self.structure = structure
        self.backend = config.backend
        self.layer = nn.ModuleList(PackedLayer(w) for w in layers or _empty_layers(structure))
        self._num_heads = [len(layer.heads) for layer in structure.layers]
        self._cache = ops.PrepackCache()
        self._released = False
        self.eval()

    def weights(self) -> list[Tensor]:
        """The canonical weights of all layers, as the `encoder` op takes them."""
        return [tensor for layer in self.layer for tensor in layer.weights()]  # type: ignore[operator]

    def release_weights(self) -> None:
        """Keep the matrices in the native kernels' layout only; where those don't run, or a second time, do nothing."""
        parameter = next(self.parameters(), None)
        if (
            self._released
            or parameter is None
            or dispatch.resolve(self.backend, parameter.device, parameter.dtype) != "cpu"
        ):
            return
        for layer in self.layer:
            layer.release_weights()  # type: ignore[operator]
        self.clear_cache()
        self._released = True

    def clear_cache(self) -> None:
        """Repack at the next forward: needed only after writing to a weight through `.data`."""
        self._cache.clear()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        all_hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run all layers.

        Args:
            hidden_states: [batch, length, hidden_size].
            attention_mask: None, [batch, length], or per query [batch, length, length] / [batch, 1, length, length].
            all_hidden_states: if given, every layer's output is appended.
            attentions: if given, every layer's attention probabilities are appended.

        Returns: `last_hidden_state` [batch, length, hidden_size], 0 where a 2-D mask is 0.
        """
        s = self.structure
        stored = [tensor for layer in self.layer for tensor in layer.stored_weights()]  # type: ignore[operator]
        gradient = torch.is_grad_enabled() and (
            hidden_states.requires_grad or any(weight.requires_grad for weight in stored)
        )
        per_query_mask = attention_mask is not None and attention_mask.dim() > 2
        settings = (self._num_heads, s.activation, s.norm, s.eps)
        if gradient or per_query_mask or all_hidden_states is not None or attentions is not None:
            output = reference.encoder(
                hidden_states,
                attention_mask,
                self.weights() if self._released else stored,
                *settings,
                all_hidden_states=all_hidden_states,
                attentions=attentions,
            )
        elif not self._released:
            output = ops.encoder(hidden_states, attention_mask, stored, *settings, self.backend, self._cache.key)
        elif hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32:
            mask = None if attention_mask is None else attention_mask != 0
            output = ops.encoder_prepacked(hidden_states, mask, stored, *settings)
        else:
            output = ops.encoder(hidden_states, attention_mask, self.weights(), *settings, self.backend)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)


def _empty_layers(structure: EncoderStructure) -> list[LayerWeights]:
    hidden = structure.hidden_size
    layers = []
    for heads, width in structure.layers:
        inner = len(heads) * structure.head_size
        shapes: tuple[tuple[int, ...], ...] = (
            *((3 * inner, hidden), (3 * inner,), (hidden, inner), (hidden,), (hidden,), (hidden,)),
            *((width, hidden), (width,), (hidden, width), (hidden,), (hidden,), (hidden,)),
        )
        layers.append(LayerWeights(*(torch.empty(shape, device="meta") for shape in shapes)))
    return layers


class PackedBertModel(BertModel):
    """A BertModel with a PackedEncoder: the class that a patched BertModel instance is given.

    It has its own forward, so that the 2-D mask reaches the encoder as the caller gave it, whatever attention
    implementation the config names, and so that hidden states and attentions don't depend on transformers' hooks
    on modules that are no longer there.
    """

    def train(self, mode: bool = True) -> "PackedBertModel":
        """Only `train(False)`: what packing folds away is constant in inference only.

        Raises:
            RuntimeError: mode is True.
        """
        if mode:
            raise RuntimeError(
                "a packed BERT is for inference (dropout would change what packing folded): call "
                "packedbert.unpatch_model(model) to train the original, and patch_model again afterwards"
            )
        super().train(False)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """As BertModel.forward, for an encoder.

        Args:
            input_ids: int [batch, length]; or else `inputs_embeds`.
            attention_mask: None, [batch, length] with non-zero for real tokens, or per query
                [batch, length, length] or [batch, 1, length, length] (boolean, integer, or added to the scores).
            token_type_ids: int [batch, length].
            position_ids: int [batch or 1, length].
            inputs_embeds: [batch, length, hidden_size].
            **kwargs: `output_hidden_states` (a flag or indices), `output_attentions`, `return_dict`; None or False
                for what only a decoder takes.

        Returns: `last_hidden_state` [batch, length, hidden_size], 0 at padded positions (a stock BERT leaves
        meaningless numbers there), and `pooler_output`, `hidden_states`, `attentions` as BertModel does;
        attentions are those of the heads that are left.

        Raises:
            ValueError: shapes, lengths or arguments that don't fit.
            IndexError: an id outside its embedding table (on the CPU).
        """
        config = self.config
        return_dict = _option(kwargs, "return_dict", getattr(config, "return_dict", True))
        output_attentions = _option(kwargs, "output_attentions", config.output_attentions)
        output_hidden_states = _option(kwargs, "output_hidden_states", config.output_hidden_states)
        refused = [
            name for name, value in kwargs.items() if name not in _IGNORED and value is not None and value is not False
        ]
        if refused:
            raise ValueError(
                f"PackedBertModel.forward: expected the arguments of a BERT encoder, got also {', '.join(refused)}; "
                "packedbert.unpatch_model(model) brings back the stock forward"
            )
        length = _check_inputs(input_ids, inputs_embeds, attention_mask, config.max_position_embeddings)
        embedded = self._embed(input_ids, token_type_ids, position_ids, inputs_embeds)

        every_layer: list[Tensor] | None = None
        if output_hidden_states is not None and output_hidden_states is not False:
            every_layer = [embedded]
        attentions: list[Tensor] | None = [] if output_attentions else None
        last = self.encoder(embedded, attention_mask, every_layer, attentions).last_hidden_state
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=self.pooler(last) if self.pooler is not None and length > 0 else None,
            hidden_states=None if every_layer is None else _selected(every_layer, output_hidden_states),
            attentions=None if attentions is None else tuple(attentions),
        )
        return output if return_dict else output.to_tuple()

    def _embed(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        tables = self.embeddings
        try:
            if type(tables) is BertEmbeddings and not tables._forward_hooks and not tables._forward_pre_hooks:
                return _embed_tokens(tables, input_ids, token_type_ids, position_ids, inputs_embeds)
            return tables(
                input_ids=input_ids,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
            )
        except (IndexError, RuntimeError) as error:
            for name, ids, table in (
                ("input_ids", input_ids, tables.word_embeddings),
                ("token_type_ids", token_type_ids, tables.token_type_embeddings),
                ("position_ids", position_ids, tables.position_embeddings),
            ):
                if ids is None or ids.numel() == 0 or ids.device.type != "cpu":
                    continue
                low, high, rows = int(ids.min()), int(ids.max()), table.num_embeddings
                if low < 0 or high >= rows:
                    raise IndexError(
                        f"{name}: expected 0 to {rows - 1}, got {low} to {high}; "
                        "does the tokenizer belong to this model?"
                    ) from error
            raise


def _embed_tokens(
    tables: Any,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    """BertEmbeddings.forward in inference, to the same bits, in half its time.

    Defaults are rows of a table instead of look-ups, and sums are made in place.
    """
    words = tables.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    types, positions = tables.token_type_embeddings, tables.position_embeddings
    x = words + (types.weight[0] if token_type_ids is None else types(token_type_ids))
    x += positions.weight[: x.shape[1]] if position_ids is None else positions(position_ids)
    return tables.LayerNorm(x)


# save_pretrained writes the class name into config.json, where it names the stock architecture.
PackedBertModel.__name__ = BertModel.__name__

#: Arguments that change nothing for an encoder in inference.
_IGNORED = {"cache_position", "num_items_in_batch", "use_cache"}


def _option(kwargs: dict[str, Any], name: str, default: Any) -> Any:
    value = kwargs.pop(name, None)
    return default if value is None else value


def _selected(states: list[Tensor], selection: bool | int | list[int]) -> tuple[Tensor | None, ...]:
    """All hidden states, or (as transformers does for indices) None in place of those that were not asked for."""
    if selection is True:
        return tuple(states)
    indices = [selection] if isinstance(selection, int) else list(selection)
    wanted = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if index in wanted else None for index, state in enumerate(states))


def _check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, max_length: int
) -> int:
    """The length of the padded batch.

    Raises:
        ValueError: anything that doesn't fit.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "expected exactly one of input_ids and inputs_embeds, got " + ("neither" if input_ids is None else "both")
        )
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected [batch, length], got {list(input_ids.shape)}")
        batch, length = input_ids.shape
    else:
        assert inputs_embeds is not None
        if inputs_embeds.dim() != 3:
            raise ValueError(f"inputs_embeds: expected [batch, length, hidden_size], got {list(inputs_embeds.shape)}")
        batch, length, _ = inputs_embeds.shape
    if length > max_length:
        raise ValueError(
            f"length: expected at most {max_length} tokens (max_position_embeddings), got {length}; truncate, or "
            "split into windows as packedbert.QuestionAnswerer does"
        )
    if attention_mask is not None:
        per_query = ((batch, length, length), (batch, 1, length, length), (1, 1, length, length))
        if tuple(attention_mask.shape) not in ((batch, length), *per_query):
            raise ValueError(
                f"attention_mask: expected {[batch, length]}, {[batch, length, length]} or "
                f"{[batch, 1, length, length]}, got {list(attention_mask.shape)}"
            )
    return length
