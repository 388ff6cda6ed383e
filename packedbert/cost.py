"""What an encoder layer costs by its heads and FFN rows: what `prune_model` spends its budget on."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import bench
from .patch import patch_model

#: FFN rows are pruned in blocks of so many: the kernels' panels. A width in between costs as much as the next one.
ROW_BLOCK = 32

#: Layers of the models that are timed, and how often each is run.
_LAYERS, _ROUNDS = 4, 15


@dataclass(frozen=True)
class CostModel:
    """The cost of a model is `fixed` plus, for each layer, that of its heads and that of its FFN rows.

    Attributes:
        heads: cost of 0, 1, ... heads in one layer.
        rows: cost of 0, 1, ... blocks of `ROW_BLOCK` FFN rows in one layer.
        fixed: of everything that pruning leaves alone.
        unit: "s" or "FLOP".
        about: how it was found, for people.
    """

    heads: tuple[float, ...]
    rows: tuple[float, ...]
    fixed: float
    unit: str
    about: str

    def of(self, widths: Sequence[tuple[int, int]]) -> float:
        """The cost of a model.

        Args:
            widths: heads and FFN rows of each layer.
        """
        return self.fixed + sum(self.heads[heads] + self.rows[-(-rows // ROW_BLOCK)] for heads, rows in widths)


def flops(structure: bench.Structure, batch: int, length: int) -> CostModel:
    """Floating-point operations of a forward, as `bench.Structure.flops` counts them."""
    tokens, head_size = batch * length, structure.hidden_size // structure.num_heads
    head = 2 * tokens * structure.hidden_size * 4 * head_size + 4 * tokens * length * head_size
    block = 2 * tokens * structure.hidden_size * 2 * ROW_BLOCK
    blocks = -(-structure.intermediate_size // ROW_BLOCK)
    return CostModel(
        tuple(float(head * count) for count in range(structure.num_heads + 1)),
        tuple(float(block * count) for count in range(blocks + 1)),
        float(2 * tokens * structure.hidden_size * 2),
        "FLOP",
        f"FLOPs at batch {batch}, length {length}",
    )


def measured(
    structure: bench.Structure,
    batch: int,
    length: int,
    precision: str = "fp32",
    progress: Callable[[int, int], object] | None = None,
) -> CostModel:
    """Seconds of packedbert's own kernels on this machine, at some widths; those in between are interpolated.

    Args:
        structure: of the dense model; its hidden size, heads, FFN rows, vocabulary and number of layers count.
        batch: sequences of the timed batch.
        length: tokens of each.
        precision: of the packed model, as in PackedBertConfig.
        progress: called with (models built and timed, in all).
    """
    blocks = -(-structure.intermediate_size // ROW_BLOCK)
    heads = _points(structure.num_heads, (0, 1, 2, 3, 4, 6, 8, 12, 16))
    rows = _points(blocks, (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128))
    whole, half = (structure.num_heads, blocks), (structure.num_heads // 2, blocks // 2)
    shapes = [(0, 0), *((count, 0) for count in heads[1:]), *((0, count) for count in rows[1:]), whole, half]
    ids = [torch.randint(structure.vocab_size, (batch, length)) for _ in range(3)]

    runs: dict[tuple[int, int], Callable[[int], object]] = {}
    for done, (count, block) in enumerate(shapes):
        width = min(block * ROW_BLOCK, structure.intermediate_size)
        model = _timed_model(structure, count, width, precision)
        runs[count, block] = _runner(model, ids)
        if progress is not None:
            progress(done + 1, len(shapes))
    with torch.inference_mode():
        times = bench.interleaved(runs, _ROUNDS)
    seconds = {shape: statistics.median(taken) for shape, taken in times.items()}
    empty = seconds[0, 0]

    def curve(points: Sequence[int], shape: Callable[[int], tuple[int, int]]) -> tuple[float, ...]:
        """Cost of one layer at 0, 1, ... up to the last point; never less with more."""
        known = list(itertools.accumulate(((seconds[shape(at)] - empty) / _LAYERS for at in points), max))
        costs = []
        for (low, below), (high, above) in itertools.pairwise(zip(points, known, strict=True)):
            costs += [below + (above - below) * (at - low) / (high - low) for at in range(low, high)]
        return (*costs, known[-1])

    # What remains of a layer without heads and rows, norms mostly, counts once for every layer.
    bare = _timed_model(structure, 0, 0, precision, layers=2 * _LAYERS)
    with torch.inference_mode():
        both = bench.interleaved({"few": runs[0, 0], "many": _runner(bare, ids)}, _ROUNDS)
    few, many = (statistics.median(both[name]) for name in ("few", "many"))
    layer = max(0.0, (many - few) / _LAYERS)

    # Heads and rows together don't cost just the sum: a line through two models that have both corrects it.
    of_heads, of_rows = curve(heads, lambda count: (count, 0)), curve(rows, lambda count: (0, count))
    sums = [empty + _LAYERS * (of_heads[count] + of_rows[block]) for count, block in (whole, half)]
    apart = seconds[whole] - seconds[half], sums[0] - sums[1]
    slope = apart[0] / apart[1] if min(apart) > 0 else 1.0  # models so small that only noise was measured
    offset = (seconds[whole] - slope * sums[0]) / _LAYERS
    layers = len(structure.heads)
    return CostModel(
        tuple(slope * taken for taken in of_heads),
        tuple(slope * taken for taken in of_rows),
        max(0.0, slope * (empty + layer * (layers - _LAYERS)) + offset * layers),
        "s",
        f"measured at batch {batch}, length {length}, {precision}, {torch.get_num_threads()} threads",
    )


def _points(most: int, wanted: Sequence[int]) -> list[int]:
    return [*(point for point in wanted if point < most), most]


def _runner(model: Any, ids: Sequence[torch.Tensor]) -> Callable[[int], object]:
    return lambda index: model(ids[index % len(ids)])


def _timed_model(structure: bench.Structure, heads: int, width: int, precision: str, layers: int = _LAYERS) -> Any:
    shape = bench.Structure(
        "timed",
        heads=(heads,) * layers,
        ffn_widths=(width,) * layers,
        hidden_size=structure.hidden_size,
        num_heads=structure.num_heads,
        intermediate_size=structure.intermediate_size,
        vocab_size=structure.vocab_size,
        max_length=structure.max_length,
    )
    return patch_model(bench.build_stock(shape), keep_original=False, precision=precision)
