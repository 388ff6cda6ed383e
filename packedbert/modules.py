"""The modules that patch.py installs: parameters in packed form, and a forward that only calls ops.

    PackedBertModel  stands in for a BertModel: checks its arguments, embeds, calls the encoder, pools; in inference on
                     the CPU the embeddings and the encoder are one native call (shortcut.py)
      PackedEncoder  the layers; one `encoder` op a forward
        PackedLayer  the parameters of one layer, of exact width (layers.py)

Parameter names and shapes are those of a packed checkpoint (see `reference.LayerWeights` for the shapes).
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEmbeddings

from . import dispatch, ops, reference, shortcut
from .config import PackedBertConfig
from .layers import PackedLayer, PrepackedLinear, QuantizedLinear, StoredQuantizedLinear, WeightAndBias
from .prepack import PreparedEncoder, allocate_together
from .quantization import QuantizationPlan, QuantizedWeight, is_skipped, plan_quantization
from .reference import MATRICES, LayerWeights
from .shortcut import OPTIONS, EmbedArguments, Shortcut, are_plain
from .structure import EncoderStructure


class EncoderOutput(NamedTuple):
    """What an encoder returns, named as in transformers' BaseModelOutput, which takes longer to make than a norm."""

    last_hidden_state: Tensor
    hidden_states: None = None
    attentions: None = None


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
        self.attention = config.resolved_attention()
        self.layer = nn.ModuleList(PackedLayer(w) for w in layers or _empty_layers(structure))
        self._num_heads = [len(layer.heads) for layer in structure.layers]
        self.cache = ops.PrepackCache()
        #: The matrices are in the layout of the kernels only.
        self._prepacked = False
        #: And the native ones can run them.
        self._native = False
        if config.precision in _HALVES:
            self.store_matrices(_HALVES[config.precision])
        elif config.precision == "int8" and layers is None:
            self._expect_quantized(config.skip)
        self.eval()

    def matrices(self) -> dict[str, WeightAndBias]:
        """The linear layers by name, "3.down"."""
        return {f"{index}.{name}": getattr(layer, name) for index, layer in enumerate(self.layer) for name in MATRICES}

    def precisions(self) -> list[tuple[str, ...]]:
        """What each layer's `MATRICES` are stored in: of config.PRECISIONS, or a dtype's name."""

        def name(part: nn.Module) -> str:
            if isinstance(part, QuantizedLinear):
                return "int8"
            dtype = part.dtype if isinstance(part, PrepackedLinear) else part.weight.dtype
            return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))  # type: ignore[arg-type]

        return [tuple(name(getattr(layer, matrix)) for matrix in MATRICES) for layer in self.layer]

    def store_matrices(self, dtype: torch.dtype) -> None:
        """Round the matrices to another floating dtype."""
        for part in self.matrices().values():
            part.weight = nn.Parameter(part.weight.detach().to(dtype), requires_grad=False)

    def quantize(self, plan: QuantizationPlan) -> None:
        """Put the plan's int8 weights in the place of the matrices, and prepack."""
        for name, part in self.matrices().items():
            if name in plan.weights:
                self._replace(name, StoredQuantizedLinear(plan.weights[name], part.bias.detach()))
        self.prepack()

    def plan_quantization(self, config: PackedBertConfig, bert_name: str) -> QuantizationPlan:
        """How `quantize` shall do it.

        Raises:
            ValueError: what is to be skipped isn't there, or the calibration is of another model.
        """
        observed = None
        if config.calibration is not None:
            observed = config.calibration.get(bert_name, {})
        weights = {name: part.weight.detach() for name, part in self.matrices().items()}
        return plan_quantization(weights, config.skip, observed)

    def _expect_quantized(self, skip: Collection[str]) -> None:
        """Make room for a checkpoint's int8 matrices."""
        for name, part in self.matrices().items():
            if is_skipped(name, skip):
                continue
            out_features, in_features = part.weight.shape
            values = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
            scales = (torch.empty(size, device="meta") for size in (out_features, in_features))
            self._replace(name, StoredQuantizedLinear(QuantizedWeight(values, *scales), part.bias.detach()))

    def _replace(self, matrix: str, part: nn.Module) -> None:
        layer, _, name = matrix.partition(".")
        setattr(self.layer[int(layer)], name, part)

    def weights(self, *, floating: bool = False) -> list[Tensor]:
        """The weights of all layers as reference.py takes them; int8 ones as floats if asked."""
        return [tensor for layer in self.layer for tensor in layer.weights(floating=floating)]  # type: ignore[operator]

    def release_weights(self) -> None:
        """Keep the matrices in the native kernels' layout only; where those don't run, or a second time, do nothing."""
        if not self._prepacked and self._runs_natively():
            self.prepack()

    def prepack(self) -> None:
        """Keep the matrices as the kernels take them, and nothing else."""
        for layer in self.layer:
            layer.prepack()  # type: ignore[operator]
        weights = [part.weight for part in self.matrices().values() if part.weight.device.type == "cpu"]
        places = allocate_together([(weight.shape, weight.dtype) for weight in weights])
        for weight, place in zip(weights, places, strict=True):
            weight.data = place.copy_(weight.data)
        self.clear_cache()
        self._prepacked = True
        self._native = self._runs_natively()

    def _runs_natively(self) -> bool:
        *_, like = (None, *self.parameters())  # a vector: those tell what the encoder computes in
        return like is not None and dispatch.resolve(self.backend, like.device, like.dtype) == "cpu"

    def clear_cache(self) -> None:
        """Repack at the next forward: needed only after writing to a weight through `.data`."""
        self.cache.clear()

    def prepared(self) -> PreparedEncoder | None:
        """The encoder for the ops that take one by a number; None where the native CPU kernels would not run it."""
        if not self._num_heads or not self._runs_natively():
            return None
        s = self.structure
        settings = (tuple(self._num_heads), s.activation, s.norm, s.eps, self.attention)
        return ops.prepare_encoder(self._stored_weights(), settings, self.cache)

    def _stored_weights(self) -> list[Tensor]:
        return [tensor for layer in self.layer for tensor in layer.stored_weights()]  # type: ignore[operator]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        all_hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> EncoderOutput:
        """Run all layers.

        Args:
            hidden_states: [batch, length, hidden_size].
            attention_mask: None, [batch, length], or per query [batch, length, length] / [batch, 1, length, length].
            all_hidden_states: if given, every layer's output is appended.
            attentions: if given, every layer's attention probabilities are appended.

        Returns: `last_hidden_state` [batch, length, hidden_size], 0 where a 2-D mask is 0.
        """
        s = self.structure
        stored = self._stored_weights()
        gradient = torch.is_grad_enabled() and (
            hidden_states.requires_grad or any(weight.requires_grad for weight in stored)
        )
        per_query_mask = attention_mask is not None and attention_mask.dim() > 2
        settings = (self._num_heads, s.activation, s.norm, s.eps)
        if gradient or per_query_mask or all_hidden_states is not None or attentions is not None:
            # Attention is in float here. Rounding has no gradient: there int8 weights are the floats they stand for.
            output = reference.encoder(
                hidden_states,
                attention_mask,
                self.weights(floating=gradient) if self._prepacked else stored,
                *settings,
                all_hidden_states=all_hidden_states,
                attentions=attentions,
            )
        elif not self._prepacked or (
            self._native and hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32
        ):
            backend = "cpu" if self._prepacked else self.backend
            output = ops.encoder(
                hidden_states, attention_mask, stored, *settings, self.attention, backend, self.cache.key
            )
        else:
            output = ops.encoder(hidden_states, attention_mask, self.weights(), *settings, self.attention, self.backend)
        return EncoderOutput(output)


_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {torch.float32: "fp32", **{dtype: name for name, dtype in _HALVES.items()}}


def _empty_layers(structure: EncoderStructure) -> list[LayerWeights]:
    hidden = structure.hidden_size
    layers = []
    for layer in structure.layers:
        inner, width = len(layer.heads) * structure.head_size_of(layer), layer.ffn_width
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

    _shortcut: Shortcut | None = None

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
        if input_ids is not None and position_ids is None and inputs_embeds is None and are_defaults(kwargs):
            result = shortcut.run(self, input_ids, token_type_ids, attention_mask)
            if result is not None:
                (last,) = result
                return make_output(_OUTPUT, last_hidden_state=last, pooler_output=self._pool(last))
        config = self.config
        return_dict = _option(kwargs, "return_dict", config)
        output_attentions = _option(kwargs, "output_attentions", config)
        output_hidden_states = _option(kwargs, "output_hidden_states", config)
        refused = [
            name for name, value in kwargs.items() if name not in _IGNORED and value is not None and value is not False
        ]
        if refused:
            raise ValueError(
                f"PackedBertModel.forward: expected the arguments of a BERT encoder, got also {', '.join(refused)}; "
                "packedbert.unpatch_model(model) brings back the stock forward"
            )
        _check_inputs(input_ids, inputs_embeds, attention_mask, config.max_position_embeddings)
        every_layer: list[Tensor] | None = None
        if output_hidden_states is not None and output_hidden_states is not False:
            every_layer = []
        attentions: list[Tensor] | None = [] if output_attentions else None
        embedded = self._embed(input_ids, token_type_ids, position_ids, inputs_embeds)
        if every_layer is not None:
            every_layer.append(embedded)
        last = self.encoder(embedded, attention_mask, every_layer, attentions).last_hidden_state
        make = _OUTPUT if torch.compiler.is_compiling() else functools.partial(make_output, _OUTPUT)
        output = make(
            last_hidden_state=last,
            pooler_output=self._pool(last),
            hidden_states=None if every_layer is None else _selected(every_layer, output_hidden_states),
            attentions=None if attentions is None else tuple(attentions),
        )
        return output if return_dict else output.to_tuple()

    def _pool(self, last: Tensor) -> Tensor | None:
        return self.pooler(last) if self.pooler is not None and last.shape[1] > 0 else None

    def find_shortcut(self) -> Shortcut | None:
        """What `shortcut.run` runs this model by; None where it can't."""
        return Shortcut.of(self, self) if type(self.encoder) is PackedEncoder else None

    def _embed(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        tables = self.embeddings
        try:
            if type(tables) is BertEmbeddings and are_plain([tables]):
                if input_ids is not None and position_ids is None and _are_ids(input_ids, token_type_ids):
                    embed = EmbedArguments.of(self)
                    gradient = torch.is_grad_enabled()
                    if embed is not None and not (gradient and any(weight.requires_grad for weight in embed.weights())):
                        return ops.embed(input_ids, token_type_ids, *embed)
                return _embed_tokens(tables, input_ids, token_type_ids, position_ids, inputs_embeds)
            return tables(
                input_ids=input_ids,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
            )
        except (IndexError, RuntimeError) as error:
            self._refuse_bad_ids(error, input_ids, token_type_ids, position_ids)
            raise

    def _refuse_bad_ids(
        self, error: Exception, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None
    ) -> None:
        tables = self.embeddings
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
                    f"{name}: expected 0 to {rows - 1}, got {low} to {high}; does the tokenizer belong to this model?"
                ) from error


def _are_ids(input_ids: Tensor, token_type_ids: Tensor | None) -> bool:
    """Whether they are what the native kernel of the op `embed` takes."""
    for ids in (input_ids, token_type_ids):
        if ids is None:
            continue
        if ids.dtype != torch.int64 or ids.shape != input_ids.shape or ids.device.type != "cpu":
            return False
    return True


_OUTPUT = BaseModelOutputWithPoolingAndCrossAttentions


def make_output(kind: Any, **values: Any) -> Any:
    """kind(**values), whose constructor asks for all fields at every attribute: 0.04 ms. Fields left out are None.

    torch.compile takes the constructor itself only.
    """
    output = kind.__new__(kind)
    output.__dict__.update(_fields(kind), **values)
    for name, value in values.items():
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
    return output


@functools.cache
def _fields(kind: Any) -> dict[str, None]:
    return dict.fromkeys(field.name for field in dataclasses.fields(kind))


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


def are_defaults(options: dict[str, Any]) -> bool:
    """Whether a forward's options ask for nothing beyond what its config does."""
    return all(
        value is None or name in _IGNORED or (name in OPTIONS and value is OPTIONS[name])
        for name, value in options.items()
    )


def _option(kwargs: dict[str, Any], name: str, config: Any) -> Any:
    value = kwargs.pop(name, None)
    return getattr(config, name) if value is None else value


def _selected(states: list[Tensor], selection: bool | int | list[int]) -> tuple[Tensor | None, ...]:
    """All hidden states, or (as transformers does for indices) None in place of those that were not asked for."""
    if selection is True:
        return tuple(states)
    indices = [selection] if isinstance(selection, int) else list(selection)
    wanted = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if index in wanted else None for index, state in enumerate(states))


def _check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, max_length: int
) -> None:
    """Refuse what doesn't fit.

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
