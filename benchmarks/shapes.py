"""What is timed: structures, cells (batch, length), and the lengths of a real padded batch."""

from __future__ import annotations

from dataclasses import replace

from packedbert.bench import SEED, STRUCTURES, Structure

Cell = tuple[int, int]

CELLS: tuple[Cell, ...] = ((1, 32), (1, 128), (1, 384), (8, 128), (8, 384), (32, 128))
QUICK_CELLS: tuple[Cell, ...] = ((1, 32), (1, 128), (8, 128))
TINY_CELLS: tuple[Cell, ...] = ((1, 8), (2, 16))

#: Where every published structure and every density is timed.
STRUCTURE_CELL: Cell = (8, 128)

#: Batches at length 128 and lengths at batch 1, for the scaling plots.
SCALING_BATCHES = (1, 2, 4, 8, 16, 32, 64)
SCALING_LENGTHS = (16, 32, 64, 128, 192, 256, 384, 512)

#: Tokens of 16 question-and-context pairs in the padded batch, [CLS] and both [SEP] included: the 1/32, 3/32, ...
#: 31/32 quantiles of SQuAD v1.1's dev set under BERT's uncased word pieces, none over 384.
SQUAD_LENGTHS = (79, 107, 120, 129, 137, 143, 150, 159, 167, 177, 186, 198, 213, 230, 260, 316)
PADDED_LENGTH = 384

DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)


def of_density(density: float) -> Structure:
    """BERT-base with the same share of heads and FFN rows left in each layer; a head at least."""
    base = SEED.unpruned()
    layers = len(base.heads)
    return replace(
        base,
        name=f"{density:.0%} of BERT-base",
        heads=(max(1, round(density * base.num_heads)),) * layers,
        ffn_widths=(round(density * base.intermediate_size),) * layers,
    )


def published() -> tuple[Structure, ...]:
    """The structures that nn_pruning published; the toy is none of them."""
    return tuple(structure for name, structure in STRUCTURES.items() if name != "tiny")
