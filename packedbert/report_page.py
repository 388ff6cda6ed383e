"""A summary as one HTML page that needs nothing else, and as pictures for a README.

bokeh and matplotlib (the extra "report") are imported where they are needed: most who use packedbert need neither.
"""

import contextlib
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.filesize import decimal, pick_unit_and_suffix

from . import __version__, charts
from .bench import Result
from .charts import nonzero_text
from .summary import ModelSummary

#: What `packedbert eval --json` prints that the page shows: heading and format of each.
_METRICS = {
    "exact_match": ("exact match", ".2f"),
    "f1": ("F1", ".2f"),
    "questions": ("questions", ",.0f"),
    "questions_per_second": ("questions/s", ".1f"),
}


# ----------------------------------------------------------------------------------------------- public


def write_report(
    summary: ModelSummary,
    page: str | os.PathLike[str] | None = "report.html",
    *,
    pictures: str | os.PathLike[str] | None = None,
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    speed: Sequence[Result] = (),
) -> list[Path]:
    """Write a model's page and pictures; a file that is there already is replaced, in one step.

    >>> packedbert.write_report(packedbert.summarize_model(model), "report.html")

    Args:
        summary: of the model.
        page: the HTML file; None: none.
        pictures: a folder for density.png and heads.png, made if need be; None: no pictures.
        evaluations: label -> what `packedbert eval --json` printed, or `squad_metrics` and "questions" returned.
        speed: all that `summary.measure_speed` returned, or nothing.

    Returns: the files.

    Raises:
        ImportError: bokeh (for a page) or matplotlib (for pictures) is missing.
        OSError: a place that can't be written to.
        ValueError: an evaluation that is none.
    """
    check_destinations(page, pictures)
    written = []
    if page is not None:
        html = render_page(summary, evaluations=evaluations, speed=speed)
        with _replacing(Path(page)) as opened:
            opened.write(html.encode())
        written.append(Path(page))
    if pictures is not None:
        for name, picture in charts.pictures(summary).items():
            file = Path(pictures) / f"{name}.png"
            with _replacing(file) as opened:
                picture.savefig(opened, format="png", dpi=150)
            written.append(file)
    return written


def check_destinations(page: str | os.PathLike[str] | None, pictures: str | os.PathLike[str] | None) -> None:
    """Raise early what `write_report` would raise late: before a model is loaded and timed."""
    if page is not None:
        _library("bokeh")
        folder = Path(page).absolute().parent
        if Path(page).is_dir():
            raise IsADirectoryError(f"{page}: expected the name of a file to write, got a folder; add a name to it")
        if not folder.is_dir():
            raise FileNotFoundError(f"{page}: expected a folder {folder} to write into, found none; make it first")
        _check_access(folder)
    if pictures is not None:
        _library("matplotlib")
        try:
            Path(pictures).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{pictures}: expected a folder for pictures, got {error.strerror}; name another") from error
        _check_access(Path(pictures))


def read_evaluation(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What `packedbert eval --json > file` left.

    Raises:
        ValueError: it is missing, or something else.
    """
    try:
        result = json.loads(Path(file).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: expected a file with an evaluation, got {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {_WANTED}, got no JSON ({error})") from error
    return _checked_evaluation(os.fspath(file), result)


def render_page(
    summary: ModelSummary,
    *,
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    speed: Sequence[Result] = (),
) -> str:
    """The page as text; the arguments are those of `write_report`.

    Raises:
        ImportError: bokeh is missing.
        ValueError: an evaluation that is none.
    """
    _library("bokeh")
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment, PackageLoader

    script, divisions = components(charts.page_charts(summary))
    environment = Environment(loader=PackageLoader("packedbert"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(
        summary=summary,
        version=__version__,
        about=_about(summary),
        figures=_figures(summary, speed),
        tables=_tables(summary, evaluations or {}, speed),
        colors={"kept": charts.KEPT, "gone": charts.GONE, "ink": charts.INK, "ramp": charts.ramp()[::15]},
        # Only the core: widgets, tables and mathematics would treble the page.
        resources=Resources(mode="inline", components=["bokeh"]).render(),
        charts=divisions,
        script=script,
    )


# ---------------------------------------------------------------------------------- what the page says


def _about(summary: ModelSummary) -> list[str]:
    """The line under the title."""
    s, report = summary.report.structure, summary.report
    stored = sorted({matrix.stored_in for matrix in summary.matrices})
    return [
        summary.architecture,
        f"{len(report.layers)} layers of {s.num_heads} heads",
        f"hidden size {s.hidden_size}",
        f"weights in {', '.join(stored) or 'no matrix'}",
        f"backend {report.backend}" + ("" if report.isa == "none" else f" ({report.isa})"),
    ]


def _figures(summary: ModelSummary, speed: Sequence[Result]) -> list[tuple[str, str]]:
    """The row at the top: a figure, and what it is."""
    layers, s = summary.report.layers, summary.report.structure
    dense, packed = summary.dense, summary.packed
    found = [
        (f"{summary.density:.1%}", "of the encoder's weights are left"),
        (f"{summary.heads_kept} of {len(layers) * s.num_heads}", "attention heads"),
        (_short(packed.parameters), f"parameters, of {_short(dense.parameters)} dense (with embeddings)"),
        (decimal(packed.bytes), f"saved packed, of {decimal(dense.bytes)} dense in float32"),
        (f"{summary.expected_speedup:.2f}x", f"expected speed-up: dense FLOPs over FLOPs left, {_shape(summary)}"),
    ]
    if speed:
        _, dense_patched, ours = speed
        # The counterpart of the expected one: pruning's gain alone, not that of the kernels.
        found.append((f"{dense_patched.median_ms / ours.median_ms:.2f}x", f"measured over {dense_patched.model}"))
    return found


def _tables(
    summary: ModelSummary, evaluations: Mapping[str, Mapping[str, Any]], speed: Sequence[Result]
) -> list[dict[str, Any]]:
    """Title, note, columns and rows of each table; `folded` ones are opened by a click."""
    tables = [_costs_table(summary)]
    if speed:
        tables.append(_speed_table(speed))
    if evaluations:
        tables.append(_evaluations_table(evaluations))
    rows = [
        (
            index,
            len(layer.heads),
            ", ".join(map(str, layer.heads)) or "none",
            f"{layer.ffn_width:,}",
            f"{layer.parameters_after:,}",
            layer.precision,
        )
        for index, layer in enumerate(summary.report.layers)
    ]
    columns = ("layer", "heads", "which", "FFN rows", "parameters", "stored in")
    tables.append({"title": "Layer by layer", "columns": columns, "rows": rows})
    weights = [
        (
            f"{matrix.layer} {matrix.name}",
            f"{matrix.total:,}",
            f"{matrix.kept:,}",
            f"{matrix.density:.1%}",
            nonzero_text(matrix),
        )
        for matrix in summary.matrices
    ]
    headings = ("matrix", "weights before pruning", "left", "density", "not zero, of those before pruning")
    tables.append({"title": "Matrix by matrix", "columns": headings, "rows": weights, "folded": True})
    return tables


def _costs_table(summary: ModelSummary) -> dict[str, Any]:
    dense, packed, report = summary.dense, summary.packed, summary.report
    total_rows = len(report.layers) * report.structure.intermediate_size
    quantities = (
        ("parameters", dense.parameters, packed.parameters, "{:,}".format),
        ("parameters of the encoder", dense.encoder_parameters, packed.encoder_parameters, "{:,}".format),
        ("attention heads", len(report.layers) * report.structure.num_heads, summary.heads_kept, "{:,}".format),
        ("FFN rows", total_rows, summary.ffn_rows_kept, "{:,}".format),
        ("size", dense.bytes, packed.bytes, decimal),
        (f"FLOPs of a forward, {_shape(summary)}", dense.flops, packed.flops, _short),
    )
    rows = [
        (
            name,
            show(before),
            show(after),
            f"{after / before:.1%}" if before else "",
            f"{before / after:.2f}x" if after else "",
        )
        for name, before, after, show in quantities
    ]
    note = "The expected speed-up is the ratio of FLOPs: what kernels that are equally fast on both would gain."
    if report.parameters_before != packed.parameters:
        note += f" The model was stored with {report.parameters_before:,} parameters, zeros included."
    columns = ("", "dense", "this model", "left", "dense / this")
    return {"title": "Before and after", "note": note, "columns": columns, "rows": rows}


def _speed_table(speed: Sequence[Result]) -> dict[str, Any]:
    import torch

    rows = [
        (
            result.model,
            f"{result.median_ms:.1f} ms",
            f"{result.quartile_1_ms:.1f} to {result.quartile_3_ms:.1f}",
            *(f"{dense.median_ms / result.median_ms:.2f}x" for dense in speed[:2]),
        )
        for result in speed
    ]
    note = (
        f"A forward without the task's head, {_shape(speed[0])}, in turns, on the CPU of the machine that made "
        f"this page, {torch.get_num_threads()} threads. The dense models have random weights. Other work "
        "on the machine slows eager PyTorch most: the times are worth something where there was none."
    )
    columns = ("model", "median", "quartiles", *(f"x {dense.model}" for dense in speed[:2]))
    return {"title": "Measured speed", "note": note, "columns": columns, "rows": rows}


def _evaluations_table(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    checked = {label: _checked_evaluation(label, result) for label, result in evaluations.items()}
    rows = [
        (
            label,
            *(
                format(result[name], form) if result.get(name) is not None else ""
                for name, (_, form) in _METRICS.items()
            ),
        )
        for label, result in checked.items()
    ]
    columns = ("evaluation", *(heading for heading, _ in _METRICS.values()))
    return {"title": "Evaluation", "note": "On SQuAD-format questions.", "columns": columns, "rows": rows}


def _shape(of: ModelSummary | Result) -> str:
    """In words: "batch 1, length 128"."""
    return f"batch {of.batch}, length {of.length}"


def _short(count: int) -> str:
    """With three or four digits and a unit: "109.1 M"."""
    unit, suffix = pick_unit_and_suffix(count, ["", "K", "M", "G", "T", "P"], 1000)
    return f"{count / unit:.1f} {suffix}" if suffix else str(count)


# ------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `file` once all of it is there.

    Raises:
        OSError: no write access, no space.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as opened:
            yield opened
        os.replace(part, file)
    except OSError as error:
        raise OSError(f"{file}: expected a place to write to, got {error.strerror or error}; name another") from error
    finally:
        part.unlink(missing_ok=True)


def _check_access(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: expected a folder to write into, got one without write access; name another")


def _library(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"packedbert report: expected {name}, which can't be imported ({error}): pip install {name}"
        ) from error


#: What a file with an evaluation has to be.
_WANTED = "expected what `packedbert eval --json` prints, an object with numbers for exact_match and f1 from 0 to 100"


def _checked_evaluation(label: str, result: Any) -> dict[str, Any]:
    """The evaluation, if it is one.

    Raises:
        ValueError: it isn't.
    """
    if not isinstance(result, Mapping):
        raise ValueError(f"{label}: {_WANTED}, got a {type(result).__name__}")
    for name in _METRICS:
        value: Any = result.get(name)
        required = name in ("exact_match", "f1")
        if value is None and not required:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (required and not 0 <= value <= 100):
            raise ValueError(f"{label}: {_WANTED}, got {name} {value!r}")
    return dict(result)
