"""Arguments of the ops for the tests, and what their results are held to."""

import itertools

import torch

from packedbert import ops

HIDDEN = 16


def random_layers(num_heads, widths, head_size=4, hidden=HIDDEN, dtype=torch.float32, seed=0):
    """The flat list of weights that the encoder op takes."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.4 * (HIDDEN / hidden) ** 0.5
    weights = []
    for heads, width in zip(num_heads, widths, strict=True):
        inner = heads * head_size
        shapes = [(3 * inner, hidden), (3 * inner,), (hidden, inner), *[(hidden,)] * 3]
        shapes += [(width, hidden), (width,), (hidden, width), *[(hidden,)] * 3]
        weights += [torch.randn(shape, generator=generator, dtype=torch.float64) * size for shape in shapes]
    return [weight.to(dtype) for weight in weights]


def ragged_qkv(lengths, heads, head_size, size=1.0):
    """float64 qkv [tokens, 3 * heads * head_size] and cu_seqlens."""
    generator = torch.Generator().manual_seed(sum(lengths) + 31 * head_size)
    bounds = [0, *itertools.accumulate(lengths)]
    qkv = torch.randn(bounds[-1], 3 * heads * head_size, generator=generator, dtype=torch.float64) * size
    return qkv, torch.tensor(bounds, dtype=torch.int32)


def prepacked_layers(weights):
    return [ops.prepack_linear(weight) if weight.dim() == 2 else weight for weight in weights]


def assert_as_exact_as_torch(got, torch_result, oracle):
    """At most twice PyTorch's own error against float64, plus two roundings of a result of that size."""
    error = (got.double() - oracle).abs().max().item() if got.numel() else 0.0
    own = (torch_result.double() - oracle).abs().max().item() if got.numel() else 0.0
    rounding = 2 * torch.finfo(got.dtype).eps * max(oracle.abs().max().item() if got.numel() else 0.0, 1.0)
    assert got.shape == oracle.shape
    assert error <= 2 * own + rounding, (error, own)
