"""What packing did to a model, as data and as a table for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .reference import MATRICES
from .structure import EncoderStructure, LayerStructure

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One encoder layer.

    Attributes:
        heads: those that are left, numbered as before any pruning.
        ffn_width: FFN rows that are left.
        head_size: dimensions of each of these heads.
        parameters_before: of the layer as the model stored it.
        parameters_after: of the packed layer.
        precisions: what each of `reference.MATRICES` is stored in, e.g. "int8".
    """

    heads: tuple[int, ...]
    ffn_width: int
    head_size: int
    parameters_before: int
    parameters_after: int
    precisions: tuple[str, ...]

    @property
    def precision(self) -> str:
        """In words: "int8", or "int8, down fp32" with exceptions."""
        most = max(self.precisions, key=self.precisions.count)
        rest = [f"{name} {p}" for name, p in zip(MATRICES, self.precisions, strict=True) if p != most]
        return ", ".join([most, *rest])


@dataclass(frozen=True)
class PatchReport:
    """What patch_model (or loading) did; `model.packedbert_report` holds it, rich prints it as a table.

    Attributes:
        structure: of the packed encoder.
        layers: one entry each.
        parameters_dense: of the encoder before any pruning.
        parameters_before: of the whole model as it was stored.
        parameters_after: of the whole packed model.
        backend: that runs the encoder, e.g. "cpu".
        isa: instruction set of the native CPU kernels, e.g. "avx512"; "none" if they are not used.
        int8_errors: matrix ("3.down") -> error of its int8 outputs on the calibration's data, as a root mean square
            relative to the outputs'; of those that were left in float32 too. Empty without a calibration.
    """

    structure: EncoderStructure
    layers: tuple[LayerReport, ...]
    parameters_dense: int
    parameters_before: int
    parameters_after: int
    backend: str
    isa: str
    int8_errors: dict[str, float]

    @property
    def heads_removed(self) -> int:
        """Heads of the unpruned encoder that are not there any more."""
        return len(self.layers) * self.structure.num_heads - sum(len(layer.heads) for layer in self.layers)

    def table(self) -> Table:
        """A rich table: a row a layer, and the totals."""
        # rich takes a good part of the package's import time, and most processes never print a report.
        from rich import box
        from rich.table import Table

        s = self.structure
        backend = self.backend if self.isa == "none" else f"{self.backend} ({self.isa})"
        table = Table(
            title=f"packed BERT: {self.parameters_before:,} stored parameters -> {self.parameters_after:,}, "
            f"backend {backend}",
            box=box.SIMPLE_HEAD,
            show_footer=True,
        )
        before, after = (
            sum(getattr(layer, f"parameters_{when}") for layer in self.layers) for when in ("before", "after")
        )
        total_heads, total_rows = s.num_heads * len(self.layers), s.intermediate_size * len(self.layers)
        kept_heads, kept_rows = (
            sum(len(layer.heads) for layer in self.layers),
            sum(layer.ffn_width for layer in self.layers),
        )
        table.add_column("layer", "all", justify="right")
        table.add_column(f"heads of {s.num_heads}", f"{kept_heads} of {total_heads}", justify="right")
        table.add_column("heads kept")
        table.add_column(f"FFN rows of {s.intermediate_size}", f"{kept_rows:,} of {total_rows:,}", justify="right")
        table.add_column("parameters stored", f"{before:,}", justify="right")
        table.add_column("packed", f"{after:,}", justify="right")
        table.add_column("of dense", f"{after / max(self.parameters_dense, 1):.0%}", justify="right")
        table.add_column("stored in")
        dense_layer = self.parameters_dense / max(len(self.layers), 1)
        for index, layer in enumerate(self.layers):
            kept = "".join("■" if head in layer.heads else "·" for head in range(s.num_heads))
            table.add_row(
                str(index),
                f"{len(layer.heads)}" + (f" x {layer.head_size}" if layer.head_size < s.head_size else ""),
                kept,
                f"{layer.ffn_width:,}",
                f"{layer.parameters_before:,}",
                f"{layer.parameters_after:,}",
                f"{layer.parameters_after / dense_layer:.0%}",
                layer.precision,
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def make_report(
    structure: EncoderStructure,
    before: list[LayerStructure] | None,
    parameters_before: int,
    parameters_after: int,
    backend: str,
    isa: str,
    precisions: list[tuple[str, ...]],
    int8_errors: dict[str, float],
) -> PatchReport:
    """Count each layer's parameters.

    Args:
        structure: of the packed encoder.
        before: each layer as it was stored; None: it was stored packed.
        parameters_before: of the whole model.
        parameters_after: of the whole model.
        backend: that runs it.
        isa: of the native kernels, if they run it.
        precisions: of each layer's matrices.
        int8_errors: as in PatchReport.
    """
    stored = before or list(structure.layers)
    layers = tuple(
        LayerReport(
            heads=now.heads,
            ffn_width=now.ffn_width,
            head_size=structure.head_size_of(now),
            parameters_before=structure.layer_parameters(len(was.heads), was.ffn_width, was.head_size),
            parameters_after=structure.layer_parameters(len(now.heads), now.ffn_width, now.head_size),
            precisions=stored_in,
        )
        for was, now, stored_in in zip(stored, structure.layers, precisions, strict=True)
    )
    dense = structure.layer_parameters(structure.num_heads, structure.intermediate_size) * len(layers)
    return PatchReport(structure, layers, dense, parameters_before, parameters_after, backend, isa, int8_errors)
