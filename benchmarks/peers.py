"""Every way to run a pruned BERT, behind one interface: a function from (input_ids, attention_mask) to two logits.

Each `Peer` builds one runner from stock transformers modules, dense or with the narrow widths. What isn't installed, or
can't do a model, raises `Missing` with a line that says so; the benchmark prints it and goes on.
"""

from __future__ import annotations

import copy
import importlib
import os
import struct
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

#: (input_ids, attention_mask), both int64 [batch, length], to the start and the end logits, each [batch, length].
Runner = Callable[[Tensor, Tensor], Sequence[Tensor]]

CALIBRATION_BATCHES = 8


class Missing(RuntimeError):
    """A peer that can't run here, and why."""


@dataclass(frozen=True)
class Peer:
    """One competitor.

    Attributes:
        name: as in the tables.
        precision: "fp32" or "int8", what its matrix products compute in.
        build: makes a runner from a stock BertForQuestionAnswering.
        ours: whether it is packedbert.
    """

    name: str
    precision: str
    build: Callable[[nn.Module], Runner]
    ours: bool = False


def need(module: str) -> Any:
    """Import a peer's package.

    Raises:
        Missing: it isn't installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{module} is not installed") from error


def torch_runner(model: Callable[..., Any]) -> Runner:
    """A runner of anything that is called like a transformers model."""

    @torch.inference_mode()
    def run(input_ids: Tensor, attention_mask: Tensor) -> Sequence[Tensor]:
        output = model(input_ids=input_ids, attention_mask=attention_mask)
        return output.start_logits, output.end_logits

    return run


def eager(model: nn.Module) -> Runner:
    """PyTorch as it comes, with transformers' default attention (SDPA)."""
    return torch_runner(model)


def compiled(model: nn.Module) -> Runner:
    """torch.compile, with its default settings; a new shape compiles anew."""
    torch._dynamo.reset()
    return torch_runner(torch.compile(copy.deepcopy(model), dynamic=False))


def ours(model: nn.Module, precision: str = "fp32") -> Runner:
    """packedbert.patch_model."""
    import packedbert

    return torch_runner(packedbert.patch_model(copy.deepcopy(model), precision=precision, keep_original=False))


def ours_int8(model: nn.Module) -> Runner:
    """The same in int8, without calibration."""
    return ours(model, "int8")


class TwoInputs(nn.Module):
    """The model as exporters want it: two tensors in, two out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end logits."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return output.start_logits, output.end_logits


def example(model: Any, batch: int = 2, length: int = 64) -> tuple[Tensor, Tensor]:
    """A batch with padding, so that no exporter drops the mask."""
    length = min(length, model.config.max_position_embeddings)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return torch.randint(model.config.vocab_size, (batch, length)), mask


def onnx_file(model: nn.Module, folder: Path) -> Path:
    """Export with free batch and length."""
    need("onnx")
    need("onnxscript")
    file = folder / "model.onnx"
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        TwoInputs(model).eval(),
        example(model),
        file,
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        output_names=["start_logits", "end_logits"],
        dynamic_shapes={"input_ids": free, "attention_mask": free},
        verbose=False,
    )
    return file


def onnxruntime_session(file: Path, folder: tempfile.TemporaryDirectory[str]) -> Runner:
    """ONNX Runtime on the CPU, all graph optimisations, as many threads as torch has."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(input_ids: Tensor, attention_mask: Tensor) -> Sequence[Tensor]:
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return [torch.from_numpy(logits) for logits in session.run(None, feed)]

    run.folder = folder  # type: ignore[attr-defined]  # the files live as long as the runner
    return run


def onnxruntime_fp32(model: nn.Module) -> Runner:
    """ONNX Runtime in float32."""
    need("onnxruntime")
    folder = tempfile.TemporaryDirectory()
    return onnxruntime_session(onnx_file(model, Path(folder.name)), folder)


def onnxruntime_int8(model: nn.Module) -> Runner:
    """ONNX Runtime's dynamic quantization: int8 weights per channel, uint8 activations per tensor."""
    need("onnxruntime")
    quantization = need("onnxruntime.quantization")
    folder = tempfile.TemporaryDirectory()
    file = onnx_file(model, Path(folder.name))
    quantized = Path(folder.name) / "int8.onnx"
    quantization.quantize_dynamic(file, quantized, per_channel=True, weight_type=quantization.QuantType.QInt8)
    return onnxruntime_session(quantized, folder)


def openvino_model(model: nn.Module) -> Any:
    """OpenVINO's graph of the model, with free batch and length."""
    openvino = need("openvino")
    ids, mask = example(model)
    return openvino.convert_model(
        TwoInputs(model).eval(),
        example_input=(ids, mask),
        input=[("input_ids", [-1, -1]), ("attention_mask", [-1, -1])],
    )


def openvino_runner(graph: Any) -> Runner:
    """OpenVINO on the CPU, for latency, in float32 where the graph isn't quantized."""
    openvino = need("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()

    def run(input_ids: Tensor, attention_mask: Tensor) -> Sequence[Tensor]:
        outputs = request.infer([input_ids.numpy(), attention_mask.numpy()])
        return [torch.from_numpy(outputs[index].copy()) for index in range(2)]

    return run


def openvino_fp32(model: nn.Module) -> Runner:
    """OpenVINO in float32."""
    return openvino_runner(openvino_model(model))


def openvino_int8(model: nn.Module) -> Runner:
    """OpenVINO after NNCF's static quantization for transformers."""
    nncf = need("nncf")
    batches = [tuple(tensor.numpy() for tensor in example(model, 2, 128)) for _ in range(CALIBRATION_BATCHES)]
    dataset = nncf.Dataset(batches)
    graph = nncf.quantize(
        openvino_model(model), dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
    )
    return openvino_runner(graph)


@torch.no_grad()
def save_as_nn_pruning(model: Any, folder: Path) -> None:
    """Write a narrow stock model as nn_pruning stores it: FFNs of full width, with zero rows.

    Raises:
        Missing: heads are gone, and which ones is not known.
    """
    config, full = copy.deepcopy(model.config), copy.deepcopy(model)
    gone = config.pruned_heads or {}
    for index, layer in enumerate(full.bert.encoder.layer):
        left = layer.attention.self.num_attention_heads
        if left + len(gone.get(index, ())) != config.num_attention_heads:
            raise Missing("which heads were pruned is not published for this structure")
        up, down = layer.intermediate.dense, layer.output.dense
        more = config.intermediate_size - up.out_features
        up.weight.data = nn.functional.pad(up.weight, (0, 0, 0, more))
        up.bias.data = nn.functional.pad(up.bias, (0, more))
        down.weight.data = nn.functional.pad(down.weight, (0, more))
    safetensors.torch.save_file(full.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["BertForQuestionAnswering"]
    config.save_pretrained(folder)


def nn_pruning(model: nn.Module) -> Runner:
    """nn_pruning's optimize_model on transformers 4.57.6, in a venv of their own (`nox -s oracle` makes one)."""
    python = os.environ.get("PACKEDBERT_ORACLE_PYTHON")
    if not python:
        raise Missing("PACKEDBERT_ORACLE_PYTHON names no python with transformers 4.57.6 and nn_pruning")
    folder = tempfile.TemporaryDirectory()
    save_as_nn_pruning(model, Path(folder.name))
    worker = Path(__file__).with_name("oracle_peer.py")
    # -I: nothing of ours on its path.
    command = [python, "-I", str(worker), folder.name, str(torch.get_num_threads())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    requests, replies = process.stdin, process.stdout
    assert requests is not None
    assert replies is not None

    def run(input_ids: Tensor, attention_mask: Tensor) -> Sequence[Tensor]:
        batch, length = input_ids.shape
        requests.write(
            struct.pack("<2q", batch, length) + input_ids.numpy().tobytes() + attention_mask.numpy().tobytes()
        )
        requests.flush()
        logits = replies.read(2 * batch * length * 4)
        if not logits:
            raise RuntimeError(f"{python} ended with status {process.wait()}")
        return torch.frombuffer(bytearray(logits), dtype=torch.float32).view(2, batch, length).unbind()

    weakref.finalize(run, process.kill)
    run.folder = folder  # type: ignore[attr-defined]  # the files live as long as the runner
    return run


PEERS = (
    Peer("packedbert", "fp32", ours, ours=True),
    Peer("PyTorch eager", "fp32", eager),
    Peer("nn_pruning", "fp32", nn_pruning),
    Peer("torch.compile", "fp32", compiled),
    Peer("ONNX Runtime", "fp32", onnxruntime_fp32),
    Peer("OpenVINO", "fp32", openvino_fp32),
    Peer("packedbert", "int8", ours_int8, ours=True),
    Peer("ONNX Runtime", "int8", onnxruntime_int8),
    Peer("OpenVINO (NNCF)", "int8", openvino_int8),
)
