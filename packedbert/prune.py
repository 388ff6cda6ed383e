"""prune_model: a dense BERT -> one with fewer heads and FFN rows that is so many times faster, without training.

The method is that of Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656):
the loss that a head or row causes when it goes is estimated by the diagonal of the Fisher information of a gate on it;
what is kept is searched under a cost model, and rearranged within each layer by that layer's whole Fisher block. Then
the matrix behind what was removed is fitted again, layer by layer, by least squares to what the dense model computes.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertModel

from . import bench, cost, examples, ops, reference
from .cost import ROW_BLOCK, CostModel
from .packing import pack_layer, places_of
from .patch import dense_layers
from .reference import LayerWeights
from .structure import DenseLayer, EncoderStructure, plan_layer

METHODS = ("fisher", "magnitude")
COSTS = ("measured", "flops")

#: Of the mean square of a matrix's inputs: keeps the least squares fit near the weights that were there.
RIDGE = 1e-2

_BATCH = 16


class Kept(NamedTuple):
    """Positions among the heads and FFN rows that a layer stores, ascending."""

    heads: tuple[int, ...]
    ffn_rows: tuple[int, ...]


@dataclass(frozen=True)
class Pruning:
    """What prune_model did; `model.packedbert_pruning` holds it.

    Attributes:
        kept: of each layer.
        cost: by which they were chosen.
        dense_cost: of the model before, in `cost.unit`.
        pruned_cost: of the model now.
        method: how importance was judged.
    """

    kept: tuple[Kept, ...]
    cost: CostModel
    dense_cost: float
    pruned_cost: float
    method: str

    @property
    def speedup(self) -> float:
        """As the cost model expects it."""
        return self.dense_cost / self.pruned_cost


@dataclass(frozen=True)
class GateGradients:
    """How the loss of each example answers to a gate on each head and FFN row, where the gates are 1.

    Attributes:
        heads: for each layer [examples, heads].
        rows: for each layer [examples, FFN rows].
    """

    heads: list[Tensor]
    rows: list[Tensor]


Progress = Callable[[str, int, int], object]


def prune_model(
    model: nn.Module,
    data: Sequence[examples.Example],
    target: float = 2.0,
    *,
    method: str | GateGradients = "fisher",
    cost_model: str | CostModel = "measured",
    batch: int = 8,
    length: int = 128,
    precision: str = "fp32",
    reconstruct: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """Prune heads and FFN rows until the model is `target` times faster.

    >>> data = packedbert.squad_training_examples(packedbert.load_squad("train.json"), tokenizer)
    >>> pruned = packedbert.prune_model(model, data[:2048], target=2.0)
    >>> packedbert.recover_model(pruned, model, data, minutes=60, folder="recovery")  # optional
    >>> packedbert.save_pruned(pruned, "folder")

    Args:
        model: a stock BERT with one BertModel in it, whose forward returns a loss for `data`; it is left as it is.
        data: labelled examples (see examples.py), one to two thousand.
        target: how many times faster than the dense model, both patched.
        method: how importance is judged, one of `METHODS`: "fisher", by gradients, or "magnitude", by weights; or what
            gate_gradients returned before, to prune to several targets.
        cost_model: "measured" times our kernels on this machine, "flops" counts; or a CostModel that was made before.
        batch, length: what speed is asked for, without padding.
        precision: that the pruned model will be patched with, if measured.
        reconstruct: fit the matrices behind what was removed, by least squares on `data`.
        progress: called with (what is done, steps done, steps in all).

    Returns: a copy of the model with the same modules: what was pruned is zero, as nn_pruning stores it, so that
    patch_model drops it. `packedbert_pruning` says what was done.

    Raises:
        ValueError: no data or data without labels; a target of 1 or less, or one that can't be reached; a model that
            is packed already; an unknown method, cost or precision.
        TypeError: not a model with one stock BERT in it.
    """
    _check(target, method, cost_model)
    examples.check(data)
    bert = only_bert(model)
    structure, layers = dense_layers(bert)
    report = progress or (lambda *_: None)
    if isinstance(cost_model, str):
        shape = structure_of(bert.config)
        if cost_model == "flops":
            cost_model = cost.flops(shape, batch, length)
        else:
            cost_model = cost.measured(shape, batch, length, precision, functools.partial(report, "timing kernels"))
    widths = [(layer.value_weight.shape[0] // structure.head_size, layer.up_weight.shape[0]) for layer in layers]
    dense_cost = cost_model.of(widths)
    budget = dense_cost / target
    least = cost_model.of([(min(1, heads), min(ROW_BLOCK, rows)) for heads, rows in widths])
    if least > budget:
        raise ValueError(
            f"target: expected at most {dense_cost / least:.2f}x, which one head and {ROW_BLOCK} FFN rows a layer "
            f"would give ({cost_model.about}), got {target:g}x"
        )
    if isinstance(method, GateGradients):
        gradients, method = method, "fisher"
    elif method == "fisher":
        gradients = gate_gradients(model, data, functools.partial(report, "importance"))
    else:
        gradients = _magnitudes(layers, structure.head_size)
    kept = choose(gradients, cost_model, budget)

    pruned = copy.deepcopy(model)
    target_bert = only_bert(pruned)
    _zero_what_is_gone(target_bert, kept, structure.head_size)
    if reconstruct:
        _fit_layers(bert, target_bert, data, functools.partial(report, "reconstruction"))
    left = [(len(layer.heads), len(layer.ffn_rows)) for layer in kept]
    result = Pruning(tuple(kept), cost_model, dense_cost, cost_model.of(left), method)
    pruned.packedbert_pruning = result  # type: ignore[assignment]
    return pruned


def _check(target: float, method: str | GateGradients, cost_model: str | CostModel) -> None:
    if not target > 1:
        raise ValueError(f"target: expected a speed-up of more than 1, got {target}")
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if isinstance(cost_model, str) and cost_model not in COSTS:
        raise ValueError(f"cost_model: expected one of {', '.join(COSTS)}, or a CostModel, got {cost_model!r}")


def only_bert(model: nn.Module) -> BertModel:
    """The BertModel in a stock model.

    Raises:
        ValueError: it is packed.
        TypeError: there is none, or more than one.
    """
    berts = [module for module in model.modules() if isinstance(module, BertModel)]
    if len(berts) != 1:
        raise TypeError(f"expected a model with one BertModel in it, got {type(model).__name__} with {len(berts)}")
    if type(berts[0]) is not BertModel:
        raise ValueError("expected a stock model, got one that is packed already: unpatch_model(model) first")
    return berts[0]


def structure_of(config: Any) -> bench.Structure:
    """The unpruned shape that a BertConfig describes."""
    layers = config.num_hidden_layers
    return bench.Structure(
        "dense",
        heads=(config.num_attention_heads,) * layers,
        ffn_widths=(config.intermediate_size,) * layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
    )


# ------------------------------------------------------------------------------------------------- importance


def gate_gradients(
    model: nn.Module, data: Sequence[examples.Example], progress: Callable[[int, int], object] | None = None
) -> GateGradients:
    """Gradients of the loss of every example by gates on what goes into each layer's two output matrices.

    Args:
        model: a stock model, in whatever mode; it is the same afterwards.
        data: labelled examples.
        progress: called with (examples done, in all).

    Raises:
        ValueError: the model returns no loss for them, or one that is not finite.
    """
    bert = only_bert(model)
    layers = bert.encoder.layer
    training = model.training
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: dict[tuple[int, str], list[Tensor]] = {}
    done = 0
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)  # only the gates' gradients are wanted
    try:
        for batch in examples.batches(data, _BATCH, bert.config.pad_token_id or 0):
            size = len(batch["input_ids"])
            gates: dict[tuple[int, str], Tensor] = {}
            hooks = []
            for index, layer in enumerate(layers):
                heads = layer.attention.self.num_attention_heads
                for kind, module, count in (
                    ("heads", layer.attention.output.dense, heads),
                    ("rows", layer.output.dense, layer.output.dense.in_features),
                ):
                    gate = torch.ones(size, count, requires_grad=True)
                    gates[index, kind] = gate
                    hooks.append(module.register_forward_pre_hook(functools.partial(_apply_gate, gate)))
            try:
                with torch.enable_grad():
                    loss = getattr(model(**batch), "loss", None)
                    if loss is None:
                        raise ValueError(
                            f"data: expected labels that {type(model).__name__} computes a loss of, got "
                            f"{', '.join(batch)}"
                        )
                    if not torch.isfinite(loss):
                        raise ValueError(f"model: expected a finite loss, got {loss.item()}; check weights and labels")
                    # The loss is a mean over the batch; each example's own is wanted.
                    gradients = torch.autograd.grad(loss * size, list(gates.values()))
            finally:
                for hook in hooks:
                    hook.remove()
            for key, gradient in zip(gates, gradients, strict=True):
                found.setdefault(key, []).append(gradient)
            done += size
            if progress is not None:
                progress(done, len(data))
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)
    stacked = {key: torch.cat(parts) for key, parts in found.items()}
    return GateGradients(*([stacked[index, kind] for index in range(len(layers))] for kind in ("heads", "rows")))


def _apply_gate(gate: Tensor, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Multiply the units [batch, length, count * size] by gate [batch, count]."""
    units = inputs[0]
    return (units * gate.repeat_interleave(units.shape[-1] // gate.shape[1], 1)[:, None].to(units.dtype),)


def _magnitudes(layers: Sequence[DenseLayer], head_size: int) -> GateGradients:
    """As if every unit's gradient were the norm of its weights relative to the layer's mean: the baseline."""
    heads, rows = [], []
    for layer in layers:
        parts = (layer.value_weight, layer.attention_output_weight.t())
        norms = sum(part.float().reshape(-1, head_size * part.shape[1]).norm(dim=1) for part in parts)
        widths = layer.up_weight.float().norm(dim=1) + layer.down_weight.float().norm(dim=0)
        assert isinstance(norms, Tensor)
        heads.append((norms / norms.mean())[None])
        # Rows and heads meet in one search: both by what share of their matrices they are.
        rows.append((widths / widths.mean())[None] * math.sqrt(len(norms) / len(widths)))
    return GateGradients(heads, rows)


# ----------------------------------------------------------------------------------------------------- search


def choose(gradients: GateGradients, cost_model: CostModel, budget: float) -> list[Kept]:
    """What each layer keeps, so that the cost is within the budget and the estimated loss is small.

    Every layer's heads, and its blocks of FFN rows, are ranked by the diagonal of the Fisher information; how many of
    them each layer keeps minimizes lost importance + price * cost, and the price is the lowest that meets the budget.
    What is left of the budget then buys what is worth most. Within a layer, `rearrange` exchanges what is correlated.
    """
    # (layer, kind) -> lost importance if 0, 1, ... units or blocks are kept.
    lost: dict[tuple[int, str], Tensor] = {}
    costs = {"heads": torch.tensor(cost_model.heads), "rows": torch.tensor(cost_model.rows)}
    sizes = {"heads": 1, "rows": ROW_BLOCK}
    fishers = {}
    for kind in ("heads", "rows"):
        for index, gradient in enumerate(getattr(gradients, kind)):
            fishers[index, kind] = fisher = gradient.double().t() @ gradient.double()
            ranked = fisher.diagonal().sort(descending=True).values
            blocks = torch.stack([block.sum() for block in ranked.split(sizes[kind])])
            lost[index, kind] = torch.cat([blocks.flip(0).cumsum(0).flip(0), blocks.new_zeros(1)])

    def kept_at(price: float) -> dict[tuple[int, str], int]:
        # At least one: a layer without heads or rows is legal, but stock modules can't train one.
        return {key: 1 + int((value + price * costs[key[1]][: len(value)])[1:].argmin()) for key, value in lost.items()}

    def spent(kept: dict[tuple[int, str], int]) -> float:
        return cost_model.fixed + sum(float(costs[kind][count]) for (_, kind), count in kept.items())

    # spent() falls with the price; find the lowest price within the budget.
    low = 1e-12 * max(float(value[0]) for value in lost.values()) / budget
    high = 1e12 * low
    while spent(kept_at(high)) > budget and high < 1e30:
        high *= 1e3
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(kept_at(middle)) > budget else (low, middle)
    kept = kept_at(high)
    while True:
        room = budget - spent(kept)
        offers = []
        for key, count in kept.items():
            if count + 1 < len(lost[key]):
                price = float(costs[key[1]][count + 1] - costs[key[1]][count])
                if price <= room:
                    offers.append((float(lost[key][count] - lost[key][count + 1]) / max(price, 1e-30), key))
        if not offers:
            break
        kept[max(offers)[1]] += 1

    kept_of_layers = []
    for index in range(len(gradients.heads)):
        parts = []
        for kind in ("heads", "rows"):
            fisher = fishers[index, kind]
            count = min(kept[index, kind] * sizes[kind], len(fisher))
            ranked = fisher.diagonal().argsort(descending=True, stable=True)
            keep = torch.zeros(len(fisher), dtype=torch.bool)
            keep[ranked[:count]] = True
            parts.append(tuple(rearrange(fisher, keep).nonzero().flatten().tolist()))
        kept_of_layers.append(Kept(*parts))
    return kept_of_layers


def rearrange(fisher: Tensor, keep: Tensor) -> Tensor:
    """Exchange kept and removed units while that lowers the loss which a layer's whole Fisher block expects.

    Args:
        fisher: [units, units].
        keep: bool [units].

    Returns: bool [units], as many kept.
    """
    gone = ~keep
    # The loss is sum(fisher[gone][:, gone]); `pull` is each unit's part in it.
    pull = fisher[:, gone].sum(1)
    for _ in range(int(gone.sum())):
        removed, kept = gone.nonzero().flatten(), (~gone).nonzero().flatten()
        if not len(removed) or not len(kept):
            break
        back = fisher.diagonal()[removed] - 2 * pull[removed]
        out = fisher.diagonal()[kept] + 2 * pull[kept]
        change = back[:, None] + out[None] - 2 * fisher[removed][:, kept]
        best = int(change.argmin())
        if change.flatten()[best] >= -1e-9 * fisher.diagonal().abs().sum():
            break
        came, went = removed[best // len(kept)], kept[best % len(kept)]
        gone[came], gone[went] = False, True
        pull += fisher[:, went] - fisher[:, came]
    return ~gone


# ------------------------------------------------------------------------------------- removing, and fitting again


@torch.no_grad()
def _zero_what_is_gone(bert: BertModel, kept: Sequence[Kept], head_size: int) -> None:
    for layer, left in zip(bert.encoder.layer, kept, strict=True):
        heads = torch.ones(layer.attention.self.query.out_features // head_size, dtype=torch.bool)
        heads[list(left.heads)] = False
        inner = heads.repeat_interleave(head_size)
        for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            linear.weight[inner] = 0
            linear.bias[inner] = 0
        layer.attention.output.dense.weight[:, inner] = 0
        rows = torch.ones(layer.intermediate.dense.out_features, dtype=torch.bool)
        rows[list(left.ffn_rows)] = False
        layer.intermediate.dense.weight[rows] = 0
        layer.intermediate.dense.bias[rows] = 0
        layer.output.dense.weight[:, rows] = 0


class _Stream:
    """The real tokens of one batch on their way through an encoder."""

    def __init__(self, bert: BertModel, batch: dict[str, Tensor]) -> None:
        real = batch["attention_mask"] != 0 if "attention_mask" in batch else batch["input_ids"].ge(0)
        inputs = {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}
        self.tokens = bert.embeddings(**inputs)[real].float()
        self.cu_seqlens = nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)


class _Sublayers:
    """The two halves of a layer, each cut before its last matrix: `inner` gives its inputs."""

    def __init__(self, weights: LayerWeights, heads: int, structure: EncoderStructure) -> None:
        self.weights = weights = LayerWeights(*(weight.float() for weight in weights))
        self.heads, self.structure = heads, structure
        self.qkv = ops.prepack_linear(weights.qkv_weight)
        self.up = ops.prepack_linear(weights.up_weight)

    def inner(self, half: int, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[tokens, width]: the context (half 0) or the FFN's activations (half 1)."""
        w = self.weights
        if half == 0:
            return ops.pruned_attention(ops.packed_linear(x, self.qkv, w.qkv_bias), cu_seqlens, self.heads)
        return ops.packed_linear(x, self.up, w.up_bias, self.structure.activation)

    def output(self, half: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the last matrix."""
        w = self.weights
        return (w.down_weight, w.down_bias) if half else (w.attention_output_weight, w.attention_output_bias)

    def norm(self, half: int, sums: Tensor) -> Tensor:
        """The norm after the residual."""
        w = self.weights
        weight, bias = (
            (w.output_norm_weight, w.output_norm_bias) if half else (w.attention_norm_weight, w.attention_norm_bias)
        )
        return reference.normalize(sums, self.structure.norm, weight, bias, self.structure.eps)


@torch.no_grad()
def _fit_layers(
    dense: BertModel,
    pruned: BertModel,
    data: Sequence[examples.Example],
    progress: Callable[[int, int], object],
) -> None:
    """Least squares for every matrix behind what was removed, from the first to the last, in place.

    A fitted matrix W takes the pruned model's own inputs x, and is to give residual + W x + b as the dense model has
    it, so it also makes up for what the layers before it lost: min |y - (W x + b)|^2 + ridge |W - W before|^2.
    """
    pad = dense.config.pad_token_id or 0
    streams = [(_Stream(dense, batch), _Stream(pruned, batch)) for batch in examples.batches(data, 2 * _BATCH, pad)]
    structure, stored = dense_layers(dense)
    _, narrow = dense_layers(pruned)
    for index, (full, zeroed) in enumerate(zip(stored, narrow, strict=True)):
        plans = [plan_layer(layer, structure.head_size) for layer in (full, zeroed)]
        teacher, student = (
            _Sublayers(pack_layer(layer, plan, structure.head_size, structure.activation), len(plan.heads), structure)
            for layer, plan in zip((full, zeroed), plans, strict=True)
        )
        layer, plan = pruned.encoder.layer[index], plans[1]
        places = (
            (layer.attention.output.dense, places_of(plan, plan.value_dimensions, structure.head_size)),
            (layer.output.dense, torch.tensor(plan.ffn_rows, dtype=torch.long)),
        )
        for half, (module, columns) in enumerate(places):
            fit = _LeastSquares(*student.output(half))
            target = _prepacked(*teacher.output(half))
            for full_stream, stream in streams:
                inner = teacher.inner(half, full_stream.tokens, full_stream.cu_seqlens)
                y = ops.packed_linear(inner, *target, residual=full_stream.tokens)
                fit.add(student.inner(half, stream.tokens, stream.cu_seqlens), y - stream.tokens)
                full_stream.tokens = teacher.norm(half, y)
            weight, bias = fit.solve()
            fitted = _prepacked(weight, bias)
            for _, stream in streams:
                inner = student.inner(half, stream.tokens, stream.cu_seqlens)
                stream.tokens = student.norm(half, ops.packed_linear(inner, *fitted, residual=stream.tokens))
            real = columns >= 0  # a head may be padded
            module.weight[:, columns[real]] = weight[:, real].to(module.weight.dtype)
            module.bias.copy_(bias)
            progress(2 * index + half + 1, 2 * len(stored))


def _prepacked(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """For ops.packed_linear. PyTorch's own product is compiled anew for every number of tokens."""
    return ops.prepack_linear(weight), bias


class _LeastSquares:
    """min over W, b of sum |y - (W x + b)|^2 + ridge |W - weight|^2, from sums over the rows x, y in float64."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.start = torch.cat([weight, bias[:, None]], 1).double()
        size = self.start.shape[1]
        self.xx = self.start.new_zeros(size, size)
        self.yx = torch.zeros_like(self.start)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows: x [tokens, in], y [tokens, out]."""
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.xx += (x.t() @ x).double()
        self.yx += (y.t() @ x).double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, float32."""
        size = len(self.xx) - 1
        ridge = RIDGE * float(self.xx.diagonal()[:size].mean()) if size else 0.0
        penalty = self.xx.new_full((size + 1,), ridge)
        penalty[size] = 1e-9 * float(self.xx[size, size])  # the bias is free
        change = torch.linalg.solve(self.xx + penalty.diag(), (self.yx - self.start @ self.xx).t()).t()
        fitted = self.start + change
        return fitted[:, :size].float(), fitted[:, size].float()
