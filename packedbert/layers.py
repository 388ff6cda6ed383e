"""The parameters of packed layers: canonical, or as the kernels read them.

    PackedLayer            one encoder layer: four linear layers and two norms, in the order of `LayerWeights`
      WeightAndBias        a linear layer or a norm as a checkpoint has it, in any floating dtype
      PrepackedLinear      a linear layer as the native CPU kernels read it
      StoredQuantizedLinear, QuantizedLinear   the same two in int8

    QuantizedEmbedding     the table of word embeddings in int8

Whatever they hold, `state_dict` has what a checkpoint stores.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, reference
from .quantization import QuantizedWeight, pack_quantized, quantize_weight, unpack_quantized
from .reference import MATRICES, LayerWeights


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
        super().__init__(ops.prepack_linear(linear.weight.detach().float()), linear.bias.detach())
        self.dtype = linear.weight.dtype  # of the canonical weight
        self.in_features = linear.weight.shape[1]

    def reference_weight(self) -> Tensor:
        """[out_features, in_features], rebuilt bit for bit, as `reference.packed_linear` takes it."""
        weight = self.weight.detach()
        if weight.dim() == 3:
            weight = weight.transpose(1, 2).flatten(0, 1)[: self.bias.shape[0]].contiguous()
        return weight.to(self.dtype) if self.dtype != torch.float32 else weight

    def float_weight(self) -> Tensor:
        """[out_features, in_features] in a floating dtype."""
        return self.reference_weight()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.reference_weight()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        canonical = state_dict.get(f"{prefix}weight")
        if canonical is not None:
            packed = ops.prepack_linear(canonical.to(device=self.weight.device, dtype=self.weight.dtype))
            state_dict[f"{prefix}weight"] = packed  # load_state_dict has made a copy of the caller's
        super()._load_from_state_dict(state_dict, prefix, *args)


class StoredQuantizedLinear(nn.Module):
    """A linear layer's parameters with an int8 weight, as a checkpoint stores them; a `QuantizedLinear` runs them."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor) -> None:
        super().__init__()
        for name, tensor in zip(_QUANTIZED_PARTS, weight, strict=True):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = nn.Parameter(bias, requires_grad=False)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight."""
        return QuantizedWeight(*(self.get_parameter(name).detach() for name in _QUANTIZED_PARTS))


class QuantizedLinear(WeightAndBias):
    """A linear layer's parameters with an int8 weight in one piece, as `ops.packed_linear` takes it.

    `state_dict` and `load_state_dict` have its parts, those of a StoredQuantizedLinear.
    """

    def __init__(self, stored: StoredQuantizedLinear) -> None:
        weight = stored.quantized_weight()
        super().__init__(pack_quantized(weight), stored.bias.detach())
        self.in_features = weight.values.shape[1]

    def quantized_weight(self) -> QuantizedWeight:
        """The weight, rebuilt bit for bit."""
        return unpack_quantized(self.weight.detach(), self.bias.shape[0], self.in_features)

    def reference_weight(self) -> Tensor:
        """The weight as `reference.packed_linear` takes it."""
        return self.weight

    def float_weight(self) -> Tensor:
        """[out_features, in_features], float32: what the int8 weight stands for."""
        return self.quantized_weight().dequantize()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in zip(_QUANTIZED_PARTS, self.quantized_weight(), strict=True):
            destination[f"{prefix}{name}"] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        parts = [state_dict.pop(f"{prefix}{name}", None) for name in _QUANTIZED_PARTS]
        present = [part for part in parts if part is not None]
        if len(present) == len(parts) and parts[0].dtype == torch.int8:
            state_dict[f"{prefix}weight"] = pack_quantized(QuantizedWeight(*parts)).to(self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


#: Parameter names of the fields of QuantizedWeight.
_QUANTIZED_PARTS = ("weight", "weight_scale", "input_scale")


class QuantizedEmbedding(nn.Module):
    """A table of embeddings in int8, each row with a scale of its own."""

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values, requires_grad=False)  # int8 [num_embeddings, embedding_dim]
        self.weight_scale = nn.Parameter(scale, requires_grad=False)  # [num_embeddings]
        self.num_embeddings, self.embedding_dim = values.shape

    @classmethod
    def of(cls, table: nn.Embedding) -> "QuantizedEmbedding":
        """Round a table; on the meta device, make room for one."""
        if table.weight.is_meta:
            scale = torch.empty(table.num_embeddings, device="meta")
            return cls(torch.empty(table.weight.shape, dtype=torch.int8, device="meta"), scale)
        rounded = quantize_weight(table.weight.detach())
        return cls(rounded.values, rounded.scale.to(table.weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim], in the scale's dtype."""
        scale = F.embedding(ids, self.weight_scale[:, None])
        return F.embedding(ids, self.weight).to(scale.dtype) * scale


class PackedLayer(nn.Module):
    """The parameters of one packed layer."""

    def __init__(self, weights: LayerWeights) -> None:
        super().__init__()
        for name, weight, bias in zip(_PARTS, weights[::2], weights[1::2], strict=True):
            self.add_module(name, WeightAndBias(weight, bias))

    def stored_weights(self) -> list[Tensor]:
        """The parameters as they are stored, in the order of `LayerWeights` (nn.Module's own look-up is slower)."""
        return [tensor for part in self._modules.values() for tensor in part._parameters.values()]  # type: ignore[union-attr,misc]

    def weights(self, *, floating: bool = False) -> list[Tensor]:
        """The fields of `LayerWeights`, in their order, as reference.py takes them; int8 ones as floats if asked."""
        tensors: list[Tensor] = []
        for part in self.children():
            assert isinstance(part, WeightAndBias)
            weight: Tensor = part.weight
            if isinstance(part, PrepackedLinear | QuantizedLinear):
                weight = part.float_weight() if floating else part.reference_weight()
            tensors += (weight, part.bias)
        return tensors

    def prepack(self) -> None:
        """Make every linear layer a PrepackedLinear or a QuantizedLinear."""
        for name in MATRICES:
            part = getattr(self, name)
            setattr(self, name, PrepackedLinear(part) if isinstance(part, WeightAndBias) else QuantizedLinear(part))


#: The child modules of a PackedLayer: `qkv`, `attention_output`, ... in the order of `LayerWeights`.
_PARTS = [name.removesuffix("_weight") for name in LayerWeights._fields[::2]]
