"""Which backend runs what: the choice, what forces it, and what is refused."""

import types

import pytest
import torch
from op_cases import HIDDEN, random_layers

import packedbert
from packedbert import dispatch, ops
from packedbert.quantization import pack_quantized, quantize_weight

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU, of a generation that the test may change."""
    native = types.SimpleNamespace(cuda_built=lambda: True, isa=dispatch.NATIVE.isa)
    monkeypatch.setattr(dispatch, "NATIVE", native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_that_can_is_used(gpu, dtype):
    assert dispatch.resolve("auto", GPU, dtype) == "cuda"
    assert dispatch.resolve("cuda", GPU, dtype) == "cuda"
    assert dispatch.resolve("auto", CPU, torch.float32) != "cuda"
    assert next(backend for backend in packedbert.backends() if backend.name == "cuda").usable


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({"get_device_capability": lambda device: (7, 5)}, torch.float16, "compute capability 7.5, .* need 8.0"),
        ({"is_available": lambda: False}, torch.float16, "PyTorch finds no CUDA device"),
        ({}, torch.float64, "the model is in torch.float64"),
    ],
)
def test_a_gpu_that_cannot_is_named(gpu, monkeypatch, changes, dtype, reason):
    for name, value in changes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.delenv(dispatch.INTERPRET_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    older = "get_device_capability" in changes  # which Triton decides for itself
    assert dispatch.resolve("auto", GPU, dtype) == ("triton" if older else "reference")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert dispatch.resolve("auto", GPU, dtype) == "reference"
    with pytest.raises(RuntimeError, match=rf"backend 'cuda' was asked for, but .*{reason}"):
        dispatch.resolve("cuda", GPU, dtype)


def test_cuda_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "cuda")
    weights = random_layers([1], [4])
    with pytest.raises(RuntimeError, match="backend 'cuda' was asked for, but"):
        ops.encoder(torch.zeros(1, 2, HIDDEN), None, weights, [1])


def test_what_the_cuda_kernels_lack_is_named():
    weights = random_layers([1], [4], head_size=4)
    assert ops._why_not_on_gpu(weights, [1]) == ""
    assert "192 dimensions" in ops._why_not_on_gpu(random_layers([1], [4], head_size=192), [1])
    weights[0] = pack_quantized(quantize_weight(weights[0]))
    assert "int8" in ops._why_not_on_gpu(weights, [1])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_unknown_attention_is_refused_by_every_backend(backend):
    with pytest.raises(ValueError, match="encoder: attention: expected one of fp32, int8, got fp8"):
        ops.encoder(torch.zeros(1, 2, HIDDEN), None, random_layers([1], [4]), [1], attention="fp8", backend=backend)
