"""The doors for checkpoints: transformers' from_pretrained, by way of a registered quantizer, and `load`.

transformers ignores `config.pruned_heads`, so a head-pruned checkpoint doesn't fit the modules that it builds. Its
quantizer hooks let us give these modules the checkpoint's widths before the weights are read, and pack them after.
A checkpoint that `save_pretrained` wrote from a packed model names us in its config.json, so it comes the same way,
straight into packed modules.
"""

import copy
import os
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, BertModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .checkpoint import CheckpointError, checkpoint_files, pruned_heads, read_shapes, stored_layers
from .config import QUANT_METHOD, PackedBertConfig
from .layers import QuantizedEmbedding
from .modules import PackedBertModel, PackedEncoder
from .patch import (
    count_parameters,
    dense_layers,
    encoder_structure,
    install_encoder,
    install_heads,
    leave_report,
    narrow,
    patch_model,
    replace_norms,
)

#: Task names of `load`, as in transformers' pipelines; each with what follows "AutoModel" and "Bert" in class names.
TASKS = {
    "question-answering": "ForQuestionAnswering",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "fill-mask": "ForMaskedLM",
    "multiple-choice": "ForMultipleChoice",
    "next-sentence-prediction": "ForNextSentencePrediction",
    "pretraining": "ForPreTraining",
    "feature-extraction": "",
}


class PackedBertQuantizer(HfQuantizer):
    """What from_pretrained calls for a `PackedBertConfig`; not a quantization, but the same two hooks."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        bert = _only_bert(model)
        shapes = read_shapes(checkpoint_files) if checkpoint_files else None
        if self.quantization_config.layers is None:
            for layer, stored in zip(bert.encoder.layer, stored_layers(bert.config, shapes), strict=True):
                narrow(
                    layer, stored.heads, stored.ffn_width, bert.config.hidden_size // bert.config.num_attention_heads
                )
            return model
        structure = encoder_structure(bert.config, self.quantization_config.layers)
        encoder = PackedEncoder(structure, None, self.quantization_config)
        if shapes is not None:
            _check_packed(encoder, shapes)
        install_encoder(bert, encoder)
        install_heads(model)
        if self.quantization_config.int8_embeddings:
            _expect_int8_embeddings(bert, shapes)
        if structure.norm == "no_norm":
            replace_norms(model)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        bert = _only_bert(model)
        if isinstance(bert, PackedBertModel):
            for parameter in bert.parameters():
                parameter.requires_grad_(False)
            if self.quantization_config.precision == "int8":
                bert.encoder.prepack()
            leave_report(model, bert.encoder, None, count_parameters(model))
            if self.quantization_config.release_weights:
                bert.encoder.release_weights()
            return model
        return patch_model(model, self.quantization_config, keep_original=False)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """save_pretrained may write it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A packed model is for inference."""
        return False

    @property
    def is_compileable(self) -> bool:
        """torch.compile works."""
        return True


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(PackedBertConfig)
    register_quantizer(QUANT_METHOD)(PackedBertQuantizer)


def stored_task(model_id: str | os.PathLike[str]) -> str:
    """The task that a checkpoint was saved for, by its config; "feature-extraction" if it doesn't say."""
    _check_folder(model_id)
    architectures = AutoConfig.from_pretrained(model_id).architectures or []
    return next((task for task, head in TASKS.items() if head and f"Bert{head}" in architectures), "feature-extraction")


def load(
    model_id: str | os.PathLike[str],
    task: str = "question-answering",
    config: PackedBertConfig | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a pruned, dense or packed BERT checkpoint as a packed model.

    The same as the Auto class's from_pretrained with a `quantization_config`, but the model that comes back is no
    "quantized" one to transformers: `.half()`, `.to()` and so on work, and `config` is honoured for packed
    checkpoints too.

    Args:
        model_id: a hub id or a folder.
        task: which head; one of `TASKS`.
        config: how to run it; PackedBertConfig() if None.
        **kwargs: fields of the config to change, as patch_model takes them, e.g. `precision="int8"`; the rest is for
            from_pretrained, e.g. `dtype=torch.float32`, `revision`, `local_files_only`.

    Returns: the model, in evaluation mode, with a `packedbert_report`.

    Raises:
        ValueError: an unknown task; a checkpoint that is damaged or contradicts its config (`CheckpointError`).
        OSError: no such checkpoint.
        RuntimeError: the backend that was asked for cannot run it.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    choices = {name: kwargs.pop(name) for name in PackedBertConfig.CHOICES if name in kwargs}
    config = (config or PackedBertConfig()).replace(**choices)
    _check_folder(model_id)
    if os.path.isdir(model_id):
        # from_pretrained would read the files before our hook sees them, and say less about what is wrong.
        read_shapes(checkpoint_files(model_id))
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    stored = AutoConfig.from_pretrained(model_id, **{name: kwargs[name] for name in names if name in kwargs})
    if getattr(stored, "quantization_config", None) is None:
        kwargs["quantization_config"] = config
    model = getattr(transformers, f"AutoModel{TASKS[task]}").from_pretrained(model_id, **kwargs)
    _forget_quantizer(model)
    encoder = _only_bert(model).encoder
    packed_as = model.config.quantization_config
    if config.precision not in ("fp32", packed_as.precision):
        raise ValueError(
            f"precision: expected a checkpoint that is not packed to make {config.precision} of, or one that is packed "
            f"so, got one packed in {packed_as.precision}; load it, unpacked, from the original checkpoint"
        )
    if getattr(stored, "quantization_config", None) is not None:
        _refuse_what_packing_decided(config, packed_as)
    if config.attention is not None:
        encoder.attention = config.attention
    if encoder.backend != config.backend:
        encoder.backend = config.backend
        leave_report(model, encoder, None, model.packedbert_report.parameters_before)
    if config.release_weights:
        encoder.release_weights()
    return model


def _refuse_what_packing_decided(config: PackedBertConfig, stored: PackedBertConfig) -> None:
    """Settings of the time of packing, asked for when a packed checkpoint is loaded.

    Raises:
        ValueError: there is one that the checkpoint was not packed with.
    """
    asked = {
        "int8_embeddings": config.int8_embeddings and not stored.int8_embeddings,
        "skip": config.skip not in ((), stored.skip),
        "calibration": config.calibration is not None,
    }
    for name in (name for name, refused in asked.items() if refused):
        raise ValueError(
            f"{name}: expected it where weights are packed, got it with a checkpoint that is packed already (in "
            f"{stored.precision}); load the original checkpoint with it"
        )


def _check_folder(model_id: str | os.PathLike[str]) -> None:
    """What can only be a path has to be there; transformers would take it for a malformed hub id, and say so."""
    text = os.fspath(model_id)
    if (os.path.isabs(text) or text.startswith(".")) and not os.path.isdir(text):
        raise FileNotFoundError(f"{text}: expected a folder with a checkpoint, found none")


def _forget_quantizer(model: Any) -> None:
    """Take back what makes transformers treat the model as quantized; its config still says how it is packed."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_is_quantized"):
            del config._is_quantized


def _only_bert(model: nn.Module) -> BertModel:
    berts = [module for module in model.modules() if isinstance(module, BertModel)]
    if len(berts) != 1:
        raise TypeError(
            f"packedbert: expected a BERT architecture (model_type 'bert'), got {type(model).__name__} with "
            f"{len(berts)} BertModels in it"
        )
    return berts[0]


def _expect_int8_embeddings(bert: BertModel, shapes: dict[str, tuple[int, ...]] | None) -> None:
    """Make room for a checkpoint's int8 table, which has to be in it."""
    name = "embeddings.word_embeddings.weight_scale"
    if shapes is not None and not any(stored.endswith(name) for stored in shapes):
        raise CheckpointError(f"{name}: expected one (quantization_config.int8_embeddings in config.json), got nothing")
    table = QuantizedEmbedding.of(bert.embeddings.word_embeddings)
    bert.embeddings.word_embeddings = table


def _check_packed(encoder: PackedEncoder, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every packed tensor must be in the file: transformers would only log a missing one, and leave it random."""
    stored = {name[name.find("encoder.layer.") :]: shape for name, shape in shapes.items() if "encoder.layer." in name}
    for name, parameter in encoder.named_parameters():
        got = stored.get(f"encoder.{name}")
        if got != tuple(parameter.shape):
            raise CheckpointError(
                f"encoder.{name}: expected {list(parameter.shape)} (quantization_config.layers in config.json), got "
                f"{'nothing' if got is None else list(got)}"
            )


def save_pruned(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a pruned, not packed model as nn_pruning published its own: what other tools read too.

    Heads whose part of the output projection is zero are left out and listed in `config.pruned_heads`; FFN rows stay,
    as zeros. `load` and `from_pretrained(..., quantization_config=PackedBertConfig())` read it.

    Args:
        model: from prune_model, trained or not; any stock BERT. It is not changed.
        folder: made if it isn't there; config.json and model.safetensors in it are replaced.

    Raises:
        ValueError: a packed model, which save_pretrained writes.
        OSError: the folder can't be written.
    """
    bert = _only_bert(model)
    if isinstance(bert, PackedBertModel):
        raise ValueError("save_pruned: expected a model that is not packed; save_pretrained writes packed ones")
    structure, layers = dense_layers(bert)
    size = structure.head_size
    config = copy.deepcopy(bert.config)
    config.architectures = [type(model).__name__]
    gone_before = pruned_heads(config)
    state = model.state_dict()
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is bert)
    pruned = {}
    for index, layer in enumerate(layers):
        stored = layer.attention_output_weight.shape[1] // size
        left = (layer.attention_output_weight.t().reshape(stored, size * structure.hidden_size) != 0).any(1)
        inner = left.repeat_interleave(size)
        name = f"{prefix}encoder.layer.{index}.attention."
        for part in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                state[f"{name}self.{part}.{kind}"] = state[f"{name}self.{part}.{kind}"][inner]
        state[f"{name}output.dense.weight"] = state[f"{name}output.dense.weight"][:, inner]
        numbers = [head for head in range(structure.num_heads) if head not in gone_before.get(index, ())]
        kept = {number for number, stays in zip(numbers, left.tolist(), strict=True) if stays}
        if gone := sorted(set(range(structure.num_heads)) - kept):
            pruned[index] = gone
    config.pruned_heads = pruned
    os.makedirs(folder, exist_ok=True)
    file = os.path.join(folder, "model.safetensors")
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, f"{file}.tmp", {"format": "pt"})
    config.save_pretrained(folder)
    os.replace(f"{file}.tmp", file)
