"""What report_page.py shows: interactive charts by bokeh, and pictures of two of them by matplotlib."""

import itertools
from collections.abc import Sequence
from typing import Any

from .summary import MATRICES, MatrixSummary, ModelSummary

#: Blue from the palette of Okabe and Ito, which the colour-blind can tell apart, and a light grey.
KEPT, GONE, INK, PAPER = "#0072b2", "#e4e9ee", "#1b2733", "#ffffff"

#: Above this density a cell is dark enough for white figures.
DARK = 0.62


def ramp() -> Sequence[str]:
    """Colours of densities from 0 to 1, light to dark."""
    from bokeh.palettes import Blues256

    return Blues256[::-1]


def page_charts(summary: ModelSummary) -> dict[str, Any]:
    """bokeh figures "density", "heads" and "ffn"; each has a tooltip for what the mouse is over."""
    return {"density": _density_chart(summary), "heads": _heads_chart(summary), "ffn": _ffn_chart(summary)}


def pictures(summary: ModelSummary) -> dict[str, Any]:
    """matplotlib figures "density" and "heads"."""
    layers, heads = summary.report.layers, range(summary.report.structure.num_heads)
    density = [[matrix.density for matrix in summary.matrices if matrix.name == name] for name in MATRICES]
    left = [[float(head in layer.heads) for layer in layers] for head in heads]
    title = f"Weights left: {summary.density:.0%} of the encoder's"
    heads_title = f"Attention heads left: {summary.heads_kept} of {len(layers) * len(heads)}"
    return {
        "density": _picture(density, list(MATRICES), "", title, "Blues", "{:.0%}"),
        "heads": _picture(left, list(map(str, heads)), "head", heads_title, [GONE, KEPT]),
    }


def nonzero_text(matrix: MatrixSummary) -> str:
    """The fraction of weights that are not 0, of those before any pruning."""
    return "not counted in int8" if matrix.nonzero is None else f"{matrix.nonzero / matrix.total:.1%}"


def _figure(name: str, summary: ModelSummary, y_range: Any, height: int, tooltips: list[tuple[str, str]]) -> Any:
    """An empty chart with a column for each layer; all charts of a page line up."""
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    chart = figure(
        name=name,
        x_range=(-0.5, len(summary.report.layers) - 0.5),
        y_range=y_range,
        height=height,
        sizing_mode="stretch_width",
        min_width=640,
        tools=[HoverTool(tooltips=tooltips, name="hover", mode="mouse", attachment="vertical")],
        toolbar_location=None,
        min_border_left=120,
        min_border_right=10,
        outline_line_color=None,
    )
    chart.xaxis.ticker = list(range(len(summary.report.layers)))
    chart.xaxis.axis_label = "layer"
    chart.grid.grid_line_color = None
    for axis in chart.axis:
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = None
        axis.major_label_text_font_size = axis.axis_label_text_font_size = "12px"
        axis.axis_label_text_font_style = "normal"
        axis.major_label_text_color = axis.axis_label_text_color = INK
    return chart


def _font_size(summary: ModelSummary) -> str:
    """Of text in a column: those of BERT-large's 24 layers are narrow."""
    return "12px" if len(summary.report.layers) <= 16 else "10px"


def _density_chart(summary: ModelSummary) -> Any:
    from bokeh.models import FactorRange
    from bokeh.transform import linear_cmap

    matrices = summary.matrices
    data = {
        "layer": [matrix.layer for matrix in matrices],
        "name": [matrix.name for matrix in matrices],
        "density": [matrix.density for matrix in matrices],
        "percent": [f"{matrix.density:.0%}" for matrix in matrices],
        "exactly": [f"{matrix.density:.1%}" for matrix in matrices],
        "weights": [f"{matrix.kept:,} of {matrix.total:,}" for matrix in matrices],
        "nonzero": [nonzero_text(matrix) for matrix in matrices],
        "stored_in": [matrix.stored_in for matrix in matrices],
        "ink": [PAPER if matrix.density > DARK else INK for matrix in matrices],
    }
    tooltips = [
        ("layer", "@layer"),
        ("matrix", "@name"),
        ("weights left", "@weights"),
        ("density", "@exactly"),
        ("not zero", "@nonzero"),
        ("stored in", "@stored_in"),
    ]
    chart = _figure("density", summary, FactorRange(*reversed(MATRICES)), 250, tooltips)
    color = linear_cmap("density", ramp(), 0, 1)
    cells = chart.rect("layer", "name", 0.95, 0.93, source=data, fill_color=color, line_color=GONE, border_radius=3)
    chart.hover.renderers = [cells]
    chart.text(
        *("layer", "name", "percent"),
        source=data,
        text_color="ink",
        text_font_size=_font_size(summary),
        text_align="center",
        text_baseline="middle",
    )
    return chart


def _heads_chart(summary: ModelSummary) -> Any:
    heads, layers = range(summary.report.structure.num_heads), summary.report.layers
    cells = [(index, head, head in layer.heads) for index, layer in enumerate(layers) for head in heads]
    data = {
        "layer": [layer for layer, _, _ in cells],
        "head": [head for _, head, _ in cells],
        "state": ["left" if left else "removed" for _, _, left in cells],
        "count": [f"{len(layers[layer].heads)} of {len(heads)}" for layer, _, _ in cells],
        "color": [KEPT if left else GONE for _, _, left in cells],
    }
    tooltips = [("layer", "@layer"), ("head", "@head, @state"), ("left in the layer", "@count")]
    chart = _figure("heads", summary, (len(heads) - 0.5, -0.5), 60 + 21 * len(heads), tooltips)
    chart.yaxis.ticker = list(heads)
    chart.yaxis.axis_label = "head"
    chart.rect("layer", "head", 0.95, 0.86, source=data, fill_color="color", line_color=None, border_radius=3)
    return chart


def _ffn_chart(summary: ModelSummary) -> Any:
    full, layers = summary.report.structure.intermediate_size, summary.report.layers
    data = {
        "layer": list(range(len(layers))),
        "full": [full] * len(layers),
        "width": [layer.ffn_width for layer in layers],
        "label": [f"{layer.ffn_width:,}" for layer in layers],
        "rows": [f"{layer.ffn_width:,} of {full:,}" for layer in layers],
        "share": [f"{layer.ffn_width / full:.1%}" for layer in layers],
    }
    chart = _figure("ffn", summary, (0, 1.1 * full), 260, [("layer", "@layer"), ("rows left", "@rows, @share")])
    chart.yaxis.axis_label = "rows"
    chart.yaxis.ticker = [0, full // 4, full // 2, 3 * full // 4, full]
    chart.yaxis.formatter.use_scientific = False
    bars = [chart.vbar("layer", 0.8, top, source=data, color=color) for top, color in (("full", GONE), ("width", KEPT))]
    chart.hover.renderers = bars[:1]  # it has the narrow ones in front of it: one tooltip, not two
    chart.text(
        "layer",
        "width",
        "label",
        source=data,
        text_color=INK,
        text_font_size=_font_size(summary),
        text_align="center",
        y_offset=-3,
    )
    return chart


def _picture(
    grid: list[list[float]], names: list[str], label: str, title: str, colors: str | list[str], form: str = ""
) -> Any:
    """Values from 0 to 1: a row for each name, a column for each layer; written into the cells in that form."""
    # Not pyplot, which keeps figures, and looks for a display.
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    layers = len(grid[0]) if grid else 0
    figure = Figure(figsize=(1.9 + 0.52 * layers, 1.2 + 0.32 * len(names)), layout="constrained")
    axes: Any = figure.add_subplot()
    colormap = colors if isinstance(colors, str) else ListedColormap(colors)
    axes.pcolormesh(grid, cmap=colormap, vmin=0, vmax=1, edgecolor=PAPER, lw=2)
    for row, layer in itertools.product(range(len(names)), range(layers if form else 0)):
        value = grid[row][layer]
        place, ink = (layer + 0.5, row + 0.5), PAPER if value > DARK else INK
        axes.text(*place, form.format(value), ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks([layer + 0.5 for layer in range(layers)], range(layers))
    axes.set_yticks([row + 0.5 for row in range(len(names))], names)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=11, loc="left")
    return figure
