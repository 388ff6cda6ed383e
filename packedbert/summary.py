"""What is left of a BERT, in figures: density of each matrix, heads, widths, parameters, bytes, operations.

Of any BERT: dense, pruned, packed or int8, patched or not. report_page.py draws it.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel

from . import bench, reference
from .modules import PackedBertModel
from .patch import patch_model, report_of
from .report import PatchReport

#: The matrices of a layer as stock BERT has them, and which of `reference.MATRICES` holds each when packed.
MATRICES = {
    "query": "qkv",
    "key": "qkv",
    "value": "qkv",
    "attention output": "attention_output",
    "FFN up": "up",
    "FFN down": "down",
}


@dataclass(frozen=True)
class MatrixSummary:
    """One matrix of one layer.

    Attributes:
        layer: its number.
        name: one of `MATRICES`.
        total: weights before any pruning.
        kept: weights of the packed matrix.
        nonzero: how many of those are not 0; None in int8, where a 0 may be a small weight that was rounded.
        stored_in: "fp32", "int8", ...
    """

    layer: int
    name: str
    total: int
    kept: int
    nonzero: int | None
    stored_in: str

    @property
    def density(self) -> float:
        """Fraction of the weights that packing keeps."""
        return self.kept / self.total


@dataclass(frozen=True)
class Cost:
    """What a model takes.

    Attributes:
        parameters: of the whole model.
        encoder_parameters: of its encoder.
        bytes: of all its tensors.
        flops: floating-point operations of a forward at the summary's batch and length (`bench.Structure.flops`).
    """

    parameters: int
    encoder_parameters: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class ModelSummary:
    """A model, before any pruning and packed.

    Attributes:
        name: for titles.
        architecture: of transformers, e.g. "BertForQuestionAnswering".
        report: heads and FFN widths of each layer, backend.
        matrices: six for each layer, in the order of `MATRICES`.
        dense: the unpruned model, in float32.
        packed: what is left, as `save_pretrained` would write it.
        batch: sequences that operations are counted for.
        length: tokens of each of them.
    """

    name: str
    architecture: str
    report: PatchReport
    matrices: tuple[MatrixSummary, ...]
    dense: Cost
    packed: Cost
    batch: int
    length: int

    @property
    def density(self) -> float:
        """Fraction of the encoder's matrices that packing keeps."""
        return sum(matrix.kept for matrix in self.matrices) / max(sum(matrix.total for matrix in self.matrices), 1)

    @property
    def heads_kept(self) -> int:
        """Heads of all layers."""
        return sum(len(layer.heads) for layer in self.report.layers)

    @property
    def ffn_rows_kept(self) -> int:
        """FFN rows of all layers."""
        return sum(layer.ffn_width for layer in self.report.layers)

    @property
    def expected_speedup(self) -> float:
        """Operations of the dense model over those that are left: what kernels equally fast on both would gain."""
        return self.dense.flops / self.packed.flops

    def as_dict(self) -> dict[str, Any]:
        """Everything, of what JSON knows."""
        layers = [
            {"layer": index, "heads": list(layer.heads), "ffn_width": layer.ffn_width}
            for index, layer in enumerate(self.report.layers)
        ]
        return {
            "model": self.name,
            "architecture": self.architecture,
            "batch": self.batch,
            "length": self.length,
            "dense": dataclasses.asdict(self.dense),
            "packed": dataclasses.asdict(self.packed),
            "parameters_stored": self.report.parameters_before,
            "density": self.density,
            "expected_speedup": self.expected_speedup,
            "layers": layers,
            "matrices": [{**dataclasses.asdict(matrix), "density": matrix.density} for matrix in self.matrices],
        }


def summarize_model(
    model: nn.Module, name: str | None = None, *, batch: int = 1, length: int | None = None
) -> ModelSummary:
    """Count what is left of a BERT.

    Args:
        model: anything that patch_model takes, patched or not, or what packedbert.load returned. Of a model with
            several BERTs, the first. It is not changed: of an unpatched one a copy is patched, for the time of the
            call.
        name: for titles; the class's if None.
        batch: sequences to count operations for.
        length: tokens of each; 128 if None, or fewer where the model has fewer positions.

    Raises:
        TypeError, ValueError: as patch_model does; a length that the model can't take.
    """
    model = patched_copy(model)
    report, bert = report_of(model), first_bert(model)
    shape = shape_of(bert)
    length = min(128, shape.max_length) if length is None else length
    if batch < 1 or not 1 <= length <= shape.max_length:
        raise ValueError(
            f"batch, length: expected 1 or more sequences of 1 to {shape.max_length} tokens (max_position_embeddings), "
            f"got {batch} of {length}"
        )
    packed_encoder = sum(layer.parameters_after for layer in report.layers)
    dense_total = report.parameters_after - packed_encoder + report.parameters_dense
    return ModelSummary(
        name=name or type(model).__name__,
        architecture=type(model).__name__,
        report=report,
        matrices=_matrices(bert.encoder, report),
        dense=Cost(dense_total, report.parameters_dense, 4 * dense_total, shape.unpruned().flops(batch, length)),
        packed=Cost(report.parameters_after, packed_encoder, _bytes(model), shape.flops(batch, length)),
        batch=batch,
        length=length,
    )


def measure_speed(model: nn.Module, batch: int, length: int, rounds: int = 10) -> list[bench.Result]:
    """Time a BERT against its dense self (random weights in the unpruned shape), in turns, on the CPU.

    Only the BertModels are timed: embeddings, encoder and, if there is one, pooler.

    Args:
        model: as for `summarize_model`; on the CPU.
        batch: sequences, without padding.
        length: tokens of each.
        rounds: timed forwards of each.

    Returns: dense with stock modules, dense with packedbert's kernels, and the model itself, patched.

    Raises:
        ValueError: it isn't on the CPU.
    """
    bert = first_bert(patched_copy(model))
    if bert.device.type != "cpu":
        raise ValueError(f"measure_speed: expected a model on the CPU, got one on {bert.device}; call .cpu() first")
    dense = shape_of(bert).unpruned()
    contestants = {
        "dense BERT, eager PyTorch": bench.build_stock(dense).bert,
        "dense BERT, packedbert": patch_model(bench.build_stock(dense), keep_original=False).bert,
        "this model, packedbert": bert,
    }
    return bench.race(contestants, dense, batch, length, rounds)


def patched_copy(model: nn.Module) -> nn.Module:
    """The model itself if it is patched, else a patched copy."""
    if isinstance(model, nn.Module) and any(isinstance(module, PackedBertModel) for module in model.modules()):
        return model
    return patch_model(copy.deepcopy(model), keep_original=False)


def first_bert(model: nn.Module) -> Any:
    """The first BertModel in a model that has one."""
    return next(module for module in model.modules() if isinstance(module, BertModel))


def shape_of(bert: Any) -> bench.Structure:
    """The shape of a packed BertModel, as bench.py describes shapes."""
    structure = bert.encoder.structure
    return bench.Structure(
        name="",
        heads=tuple(len(layer.heads) for layer in structure.layers),
        ffn_widths=tuple(layer.ffn_width for layer in structure.layers),
        hidden_size=structure.hidden_size,
        num_heads=structure.num_heads,
        intermediate_size=structure.intermediate_size,
        vocab_size=bert.config.vocab_size,
        max_length=bert.config.max_position_embeddings,
    )


def _matrices(encoder: Any, report: PatchReport) -> tuple[MatrixSummary, ...]:
    s = report.structure
    inner, found = s.num_heads * s.head_size, []
    totals = (*(inner * s.hidden_size,) * 4, *(s.intermediate_size * s.hidden_size,) * 2)
    for index, (layer, packed) in enumerate(zip(report.layers, encoder.layer, strict=True)):
        qkv, _, attention_output, _, _, _, up, _, down, *_ = packed.weights(floating=True)
        stored_in = dict(zip(reference.MATRICES, layer.precisions, strict=True))
        weights: tuple[Tensor, ...] = (*qkv.chunk(3), attention_output, up, down)
        for (name, part), total, weight in zip(MATRICES.items(), totals, weights, strict=True):
            nonzero = None if stored_in[part] == "int8" else int(torch.count_nonzero(weight))
            found.append(MatrixSummary(index, name, total, weight.numel(), nonzero, stored_in[part]))
    return tuple(found)


def _bytes(model: nn.Module) -> int:
    """Of what save_pretrained writes: a tensor that several modules share counts once."""
    tensors = {
        (tensor.data_ptr(), tensor.numel()): tensor.numel() * tensor.element_size()
        for tensor in model.state_dict().values()
        if isinstance(tensor, Tensor)
    }
    return sum(tensors.values())
