"""patch_model and unpatch_model: the chain weights -> plan -> packed weights -> modules, installed in place.

Everything that can fail happens before the first change to the model, so a refused model is left as it was.
Only instances are changed: never a class or module of transformers, nor a config that other models may share.
"""

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import BertForQuestionAnswering, BertModel

from . import dispatch
from .checkpoint import pruned_heads
from .config import PackedBertConfig
from .heads import PackedBertForQuestionAnswering
from .layers import NoNorm, PrepackedLinear, QuantizedEmbedding, QuantizedLinear
from .modules import PackedBertModel, PackedEncoder
from .packing import pack_layer
from .quantization import QuantizationPlan
from .reference import LayerWeights
from .report import PatchReport, make_report
from .structure import DenseLayer, EncoderStructure, LayerStructure, plan_layer

#: transformers' names of the FFN activations that the kernels know, and ours.
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}


@dataclass
class _Undo:
    """What unpatch_model needs, by module name: a deepcopy or unpickled model finds its own modules again."""

    encoders: dict[str, nn.Module | None] = field(default_factory=dict)
    embeddings: dict[str, nn.Module | None] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    configs: list[tuple[list[str], Any]] = field(default_factory=list)
    training: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------- public entry points


def patch_model(model: nn.Module, config: PackedBertConfig | None = None, **overrides: Any) -> nn.Module:
    """Install packed layers in every BERT encoder that the model holds, in place.

    Args:
        model: a BertModel, a BertFor..., or anything that contains one (a sentence-transformers model, say). It is
            put into evaluation mode, and embeddings and pooler stop asking for gradients; unpatch_model undoes both.
        config: how to run it; PackedBertConfig() if None.
        **overrides: fields of the config to change, e.g. `backend="reference"`.

    Returns: the same object, with a `packedbert_report` (a `PatchReport`).

    Raises:
        TypeError: there is no BERT encoder in it, or one with parts that are not the stock ones; the text names
            what was found. Also an override that does not exist.
        ValueError: it is patched already, is a decoder, has NaN weights, or widths that don't agree.
        RuntimeError: the backend that was asked for cannot run it.

    Warns:
        PackedBertWarning: once, if a slower backend than the device's own was taken.
    """
    config = (config or PackedBertConfig()).replace(**overrides)
    berts = _find_berts(model)
    parameters_before = count_parameters(model)
    packed = {}
    plans = {}
    for name, bert in berts.items():
        if config.int8_embeddings:
            _refuse_tied(model, bert)
        structure, stored, layers = _pack_encoder(bert)
        encoder = PackedEncoder(structure, layers, config)
        # A forced backend that can't run here has to be refused before anything is changed.
        dispatch.resolve(config.backend, *_placement(encoder))
        if config.precision == "int8":
            plans[name] = encoder.plan_quantization(config, name)
            encoder.quantize(plans[name])
        packed[name] = (encoder, stored)

    undo = _Undo(
        training=[name for name, module in model.named_modules() if module.training],
        gradients=[
            f"{name}.{key}" if name else key
            for name, bert in berts.items()
            for key, parameter in bert.named_parameters()
            if parameter.requires_grad and not key.startswith("encoder.")
        ],
    )
    for name in undo.gradients:
        model.get_parameter(name).requires_grad_(False)
    for name, bert in berts.items():
        encoder, _ = packed[name]
        _warn_of_hooks(bert.encoder)
        undo.encoders[name] = bert.encoder if config.keep_original else None
        undo.configs.append(_give_own_config(model, bert, _stored_config(config, encoder, plans.get(name))))
        install_encoder(bert, encoder)
        if config.int8_embeddings:
            table = bert.embeddings.word_embeddings
            undo.embeddings[name] = table if config.keep_original else None
            bert.embeddings.word_embeddings = QuantizedEmbedding.of(table)
        if encoder.structure.norm == "no_norm":
            undo.norms.update(replace_norms(model))
    install_heads(model)
    model.eval()
    model._packedbert_undo = undo  # type: ignore[assignment]
    (encoder, stored), *_ = packed.values()
    leave_report(model, encoder, stored, parameters_before, next(iter(plans.values()), None))
    if config.release_weights:
        for encoder, _ in packed.values():
            encoder.release_weights()
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Bring the original encoder back, bit for bit, on the device and in the dtype that the model has now.

    Args:
        model: what patch_model returned, or a deepcopy of it.

    Returns: the same object, as it was before patch_model, training mode and config included.

    Raises:
        ValueError: it isn't patched, or its original was not kept.
    """
    undo = getattr(model, "_packedbert_undo", None)
    if undo is None:
        found = any(isinstance(module, PackedBertModel) for module in model.modules())
        _refuse_unpatch("was loaded packed" if found else "is not patched")
    if any(encoder is None for encoder in undo.encoders.values()):
        _refuse_unpatch("was patched with keep_original=False")
    for name, encoder in undo.encoders.items():
        bert = model.get_submodule(name)
        device, dtype = _placement(bert.encoder)  # type: ignore[arg-type]
        bert.encoder = encoder.to(device=device, dtype=dtype)
        bert.__dict__.pop("_shortcut", None)
        bert.__class__ = BertModel
    for module in model.modules():
        if type(module) is PackedBertForQuestionAnswering:
            module.__dict__.pop("_shortcut", None)
            module.__class__ = BertForQuestionAnswering
    for name, table in undo.embeddings.items():
        tables: Any = model.get_submodule(name).embeddings
        like = tables.word_embeddings.weight_scale
        assert table is not None
        tables.word_embeddings = table.to(device=like.device, dtype=like.dtype)
    for name, norm in undo.norms.items():
        replacement = model.get_submodule(name)
        norm.weight, norm.bias = replacement.weight, replacement.bias
        model.set_submodule(name, norm)
    for names, config in undo.configs:
        for name in names:
            model.get_submodule(name).config = config
    for name in undo.gradients:
        model.get_parameter(name).requires_grad_(True)
    for name in undo.training:
        model.get_submodule(name).training = True
    del model._packedbert_undo, model.packedbert_report
    return model


def _refuse_unpatch(reason: str) -> NoReturn:
    raise ValueError(
        f"unpatch_model: expected a model from patch_model with its original kept, but this one {reason}: "
        "there is nothing to bring back"
    )


# --------------------------------------------------------------------------- the pieces that hf.py uses too


def install_encoder(bert: BertModel, encoder: PackedEncoder) -> None:
    """Make a BertModel instance run a packed encoder."""
    bert.encoder = encoder
    bert.__class__ = PackedBertModel


def install_heads(model: nn.Module) -> None:
    """Make models that consist of a packed BERT and an output layer run both at once, where we have a class for it."""
    for module in model.modules():
        if type(module) is BertForQuestionAnswering and type(module.bert) is PackedBertModel:
            module.__class__ = PackedBertForQuestionAnswering


def narrow(layer: Any, heads: int, ffn_width: int, head_size: int) -> None:
    """Give a stock BertLayer other widths, with weights on the meta device: to be read or drawn afterwards."""
    attention, inner = layer.attention, heads * head_size
    hidden, dtype = attention.output.dense.out_features, attention.output.dense.weight.dtype

    def linear(in_features: int, out_features: int) -> nn.Linear:
        return nn.utils.skip_init(nn.Linear, in_features, out_features, device="meta", dtype=dtype)

    for name in ("query", "key", "value"):
        setattr(attention.self, name, linear(hidden, inner))
    attention.self.num_attention_heads, attention.self.all_head_size = heads, inner
    attention.output.dense = linear(inner, hidden)
    layer.intermediate.dense, layer.output.dense = linear(hidden, ffn_width), linear(ffn_width, hidden)


def replace_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Put a NoNorm with the same parameters in place of every LayerNorm; return the replaced ones by name."""
    replaced: dict[str, Any] = {name: module for name, module in model.named_modules() if type(module) is nn.LayerNorm}
    for name, norm in replaced.items():
        assert norm.weight is not None
        assert norm.bias is not None
        module = NoNorm(norm.weight, norm.bias)
        module.weight, module.bias = norm.weight, norm.bias  # the very same parameters
        model.set_submodule(name, module)
    return replaced


def encoder_structure(config: Any, layers: tuple[LayerStructure, ...]) -> EncoderStructure:
    """What a BertConfig says about the encoder, with what is left of its layers.

    Raises:
        ValueError: a decoder, an activation or norm that the kernels don't know, heads that don't exist, or wider ones.
    """
    if config.is_decoder or config.add_cross_attention:
        raise ValueError(
            "expected a BERT encoder, got a decoder: "
            f"config.is_decoder={config.is_decoder}, config.add_cross_attention={config.add_cross_attention}"
        )
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"config.hidden_act: expected one of {', '.join(_ACTIVATIONS)}, got {config.hidden_act!r}")
    norm = getattr(config, "layer_norm_type", None) or "layer_norm"
    if norm not in ("layer_norm", "no_norm"):
        raise ValueError(f"config.layer_norm_type: expected 'layer_norm' or 'no_norm', got {norm!r}")
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"expected {config.num_hidden_layers} layers (config.num_hidden_layers), got {len(layers)}")
    head_size = config.hidden_size // config.num_attention_heads
    for index, layer in enumerate(layers):
        beyond = [head for head in layer.heads if not 0 <= head < config.num_attention_heads]
        if beyond or layer.ffn_width < 0 or len(set(layer.heads)) != len(layer.heads):
            raise ValueError(
                f"layer {index}: expected distinct heads 0 to {config.num_attention_heads - 1} and an FFN width of 0 "
                f"or more, got heads {list(layer.heads)} and width {layer.ffn_width}"
            )
        if layer.head_size is not None and not 1 <= layer.head_size <= head_size:
            raise ValueError(
                f"layer {index}: expected a head size of 1 to {head_size} (config.hidden_size / "
                f"config.num_attention_heads), got {layer.head_size}"
            )
    return EncoderStructure(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_size=head_size,
        intermediate_size=config.intermediate_size,
        activation=_ACTIVATIONS[config.hidden_act],
        norm=norm,
        eps=config.layer_norm_eps,
        layers=layers,
    )


def leave_report(
    model: nn.Module,
    encoder: PackedEncoder,
    stored: list[LayerStructure] | None,
    parameters_before: int,
    plan: QuantizationPlan | None = None,
) -> None:
    """Attach the PatchReport, and say once if the model runs on a slower backend than it might.

    Args:
        model: packed.
        encoder: its (first) packed encoder.
        stored: each layer as it was stored; None: packed.
        parameters_before: of the model as it was stored.
        plan: how it was quantized, if it was just now.
    """
    placement = _placement(encoder)
    backend = dispatch.resolve(encoder.backend, *placement)
    isa = dispatch.cpu_isa() if backend == "cpu" else "none"
    report = make_report(
        encoder.structure,
        stored,
        parameters_before,
        count_parameters(model),
        backend,
        isa,
        encoder.precisions(),
        {} if plan is None else plan.errors,
    )
    model.packedbert_report = report  # type: ignore[assignment]
    if reason := dispatch.why_slower(encoder.backend, *placement):
        warnings.warn(f"packedbert runs on plain PyTorch: {reason}", dispatch.PackedBertWarning, stacklevel=3)


def report_of(model: nn.Module) -> PatchReport:
    """The report of a packed model.

    Raises:
        ValueError: it isn't packed.
    """
    report = getattr(model, "packedbert_report", None)
    if report is None:
        raise ValueError(
            f"expected a model from patch_model or packedbert.load, got a {type(model).__name__} without a report"
        )
    return report


def count_parameters(model: nn.Module) -> int:
    """Parameters, padding and scales not counted."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for part in model.modules():
        if isinstance(part, PrepackedLinear | QuantizedLinear):
            count += part.bias.shape[0] * part.in_features - part.weight.numel()
        elif isinstance(part, QuantizedEmbedding):
            count -= part.weight_scale.numel()
    return count


def _placement(encoder: nn.Module) -> tuple[torch.device, torch.dtype]:
    *_, parameter = (None, *encoder.parameters())  # the last one is a vector: its dtype is what is computed in
    return (torch.device("cpu"), torch.float32) if parameter is None else (parameter.device, parameter.dtype)


# ------------------------------------------------------------------------------- reading the stock modules


def _find_berts(model: nn.Module) -> dict[str, BertModel]:
    """Every BertModel in the model, by name ("" is the model itself)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_model: expected a torch.nn.Module with a BERT in it, got {type(model).__name__}")
    berts = {name: module for name, module in model.named_modules() if isinstance(module, BertModel)}
    for name, bert in berts.items():
        if isinstance(bert, PackedBertModel):
            raise ValueError(
                f"patch_model: {name or 'the model'} is packed already; "
                "unpatch_model(model) first, to pack it differently"
            )
        if type(bert) is not BertModel:
            raise TypeError(
                f"patch_model: expected transformers.BertModel at {name or 'the top'}, got a subclass, "
                f"{type(bert).__module__}.{type(bert).__name__}, whose forward may differ"
            )
    if not berts:
        inner = sorted({type(m).__name__ for m in model.modules() if type(m).__name__.endswith(("Model", "Encoder"))})
        raise TypeError(
            f"patch_model: expected a model with a transformers.BertModel in it, got a {type(model).__name__}"
            + (f" that holds {', '.join(inner)}" if inner else "")
        )
    return berts


def _pack_encoder(bert: BertModel) -> tuple[EncoderStructure, list[LayerStructure], list[LayerWeights]]:
    """Plan and pack all layers of a stock BertModel.

    Returns: the structure, each layer as it was stored, and the packed weights.
    """
    config = bert.config
    structure, layers = dense_layers(bert)
    head_size = structure.head_size
    gone = pruned_heads(config)
    stored, left, packed = [], [], []
    for index, dense in enumerate(layers):
        try:
            plan = plan_layer(dense, head_size)
        except ValueError as error:
            raise ValueError(f"encoder.layer.{index}: {error}") from error
        heads = _head_numbers(config, gone.get(index, ()), dense.value_weight.shape[0] // head_size)
        stored.append(LayerStructure(heads, dense.up_weight.shape[0]))
        narrower = plan.head_size if plan.head_size < head_size else None
        left.append(LayerStructure(tuple(heads[h] for h in plan.heads), len(plan.ffn_rows), narrower))
        packed.append(pack_layer(dense, plan, head_size, _ACTIVATIONS[config.hidden_act]))
    return encoder_structure(config, tuple(left)), stored, packed


def dense_layers(bert: BertModel) -> tuple[EncoderStructure, list[DenseLayer]]:
    """What a stock BertModel's encoder is, with nothing left of its layers; and its layers' own weights.

    Raises:
        TypeError: a part of a layer is not the stock one.
        ValueError: what the kernels can't run, or widths that don't agree.
    """
    config = bert.config
    # Rejects what can't be packed before the weights are looked at.
    structure = encoder_structure(config, tuple(LayerStructure((), 0) for _ in range(config.num_hidden_layers)))
    return structure, [
        _dense_layer(module, f"encoder.layer.{index}", structure.head_size, config.layer_norm_eps)
        for index, module in enumerate(bert.encoder.layer)
    ]


def _head_numbers(config: Any, gone: tuple[int, ...], stored: int) -> tuple[int, ...]:
    """Original numbers of the stored heads, if `pruned_heads` tells them; else their positions."""
    left = tuple(head for head in range(config.num_attention_heads) if head not in gone)
    return left if len(left) == stored else tuple(range(stored))


def _dense_layer(layer: Any, name: str, head_size: int, eps: float) -> DenseLayer:
    """Read a stock BertLayer.

    Raises:
        TypeError: a part of it is not the stock one.
        ValueError: widths that don't agree, or weights that aren't there (meta device).
    """
    attention, parts = layer.attention, {}
    linears = {
        "query": attention.self.query,
        "key": attention.self.key,
        "value": attention.self.value,
        "attention_output": attention.output.dense,
        "up": layer.intermediate.dense,
        "down": layer.output.dense,
    }
    norms = {"attention_norm": attention.output.LayerNorm, "output_norm": layer.output.LayerNorm}
    for part, module in {**linears, **norms}.items():
        is_norm = part in norms
        known = (
            type(module) is nn.LayerNorm or type(module).__name__ == "NoNorm" if is_norm else type(module) is nn.Linear
        )
        if not known or module.weight is None or module.bias is None:
            raise TypeError(
                f"patch_model: {name}: expected {'LayerNorm' if is_norm else 'nn.Linear'} with a bias as {part}, got "
                f"{type(module).__module__}.{type(module).__name__}; merge or remove adapters and quantization first"
            )
        if is_norm and getattr(module, "eps", eps) != eps:
            raise ValueError(f"{name}.{part}: expected eps {eps} (config.layer_norm_eps), got {module.eps}")
        parts[f"{part}_weight"], parts[f"{part}_bias"] = module.weight.detach(), module.bias.detach()
    dense = DenseLayer(**parts)
    inner, hidden = dense.value_weight.shape
    width = dense.up_weight.shape[0]
    expected: tuple[tuple[int, ...], ...] = (
        *((inner, hidden), (inner,)) * 3,
        *((hidden, inner), (hidden,), (hidden,), (hidden,)),
        *((width, hidden), (width,), (hidden, width), (hidden,), (hidden,), (hidden,)),
    )
    for part, tensor, shape in zip(DenseLayer._fields, dense, expected, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: {part}: expected {list(shape)} to agree with the layer's other weights, "
                f"got {list(tensor.shape)}"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name}: {part}: expected weights, got a tensor on the meta device; load the checkpoint first"
            )
        if (tensor.device, tensor.dtype) != (dense.value_weight.device, dense.value_weight.dtype):
            raise ValueError(
                f"{name}: {part}: expected {dense.value_weight.dtype} on {dense.value_weight.device} like the layer's "
                f"other weights, got {tensor.dtype} on {tensor.device}"
            )
    if inner % head_size:
        raise ValueError(f"{name}: value_weight: expected a multiple of the head size {head_size}, got {inner} rows")
    return dense


# ------------------------------------------------------------------------------------ changing the instance


def _stored_config(config: PackedBertConfig, encoder: PackedEncoder, plan: QuantizationPlan | None) -> PackedBertConfig:
    """What config.json will say of how the weights are stored."""
    skip = () if plan is None else tuple(name for name in encoder.matrices() if name not in plan.weights)
    return PackedBertConfig(
        precision=config.precision,
        skip=skip,
        attention=config.attention,
        int8_embeddings=config.int8_embeddings,
        layers=encoder.structure.layers,
    )


def _refuse_tied(model: nn.Module, bert: BertModel) -> None:
    """int8 embeddings can't be shared with an output layer.

    Raises:
        ValueError: they are.
    """
    table = bert.embeddings.word_embeddings
    for name, module in model.named_modules():
        if module is not table and any(parameter is table.weight for parameter in module._parameters.values()):
            raise ValueError(f"int8_embeddings: expected embeddings of their own, got some that {name} shares")


def _give_own_config(model: nn.Module, bert: BertModel, packed: PackedBertConfig) -> tuple[list[str], Any]:
    """Give the model a config of its own that says how it is packed, in place of one that others may share.

    Returns: the names of the modules that held the old config, and the old config.
    """
    old = bert.config
    new = copy.deepcopy(old)
    new.quantization_config = packed
    names = [name for name, module in model.named_modules() if module.__dict__.get("config") is old]
    for name in names:
        model.get_submodule(name).config = new
    return names, old


def _warn_of_hooks(encoder: nn.Module) -> None:
    """Hooks of the user on modules that are about to be replaced would never fire again."""
    hooked = [
        name
        for name, module in encoder.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not getattr(hook, "__module__", "").startswith("transformers.")
    ]
    if hooked:
        warnings.warn(
            f"forward hooks on encoder.{hooked[0]} and {len(hooked) - 1} other modules don't fire while the model is "
            "patched",
            dispatch.PackedBertWarning,
            stacklevel=4,
        )
