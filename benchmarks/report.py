"""From CSVs to what people read: `python benchmarks/report.py` writes the README's tables and the plots.

The tables stand between two marker comments in README.md; nothing else there is touched.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
OURS, EAGER = "packedbert", "PyTorch eager"

Row = dict[str, str]
Cell = tuple[int, int]


def read(file: Path) -> list[Row]:
    """All rows of a CSV that bench_model.py wrote."""
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


def milliseconds(rows: list[Row], model: str, cache: str, precision: str = "fp32") -> dict[Cell, dict[str, float]]:
    """Median of each peer in each cell."""
    cells: dict[Cell, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if (row["model"], row["cache"], row["precision"]) == (model, cache, precision):
            cells[int(row["batch"]), int(row["length"])][row["peer"]] = float(row["median_ms"])
    return cells


def sgemm_gflops(rows: list[Row]) -> float:
    """The run's median rate: that of a single cell may have met a busy moment."""
    return statistics.median(float(row["sgemm_gflops"]) for row in rows)


def over_l(rows: list[Row], cell: Cell, peer: str, cache: str, precision: str = "fp32") -> float:
    """time / L of a peer on the packed model, L at the run's median sgemm rate."""
    wanted = {"model": "packed", "precision": precision, "peer": peer, "cache": cache}
    wanted |= {"batch": str(cell[0]), "length": str(cell[1])}
    row = next(row for row in rows if wanted.items() <= row.items())
    return float(row["median_ms"]) * sgemm_gflops(rows) / (1e3 * float(row["gflop"]))


def machine_line(row: Row) -> str:
    """What a run was taken on."""
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "transformers", "onnxruntime", "openvino"))
    return f"{row['cpu']}, {row['threads']} threads, {row['isa']}, {row['date']}; {versions}"


def table(rows: list[Row]) -> str:
    """Markdown: packedbert in each cell against the best float32 peer, eager PyTorch, and dense eager PyTorch."""
    packed, dense = milliseconds(rows, "packed", "hot"), milliseconds(rows, "dense", "hot")
    lines = [
        "| batch, length | packedbert | time / L | best peer, same pruned model | than it | than eager | than dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, peers in packed.items():
        ours = peers[OURS]
        name, best = min(((peer, ms) for peer, ms in peers.items() if peer != OURS), key=lambda item: item[1])
        against_dense = f"{dense[cell][EAGER] / ours:.2f}x" if cell in dense else "-"
        lines.append(
            f"| {cell[0]}, {cell[1]} | {ours:.1f} ms | {over_l(rows, cell, OURS, 'hot'):.2f} | {name}, {best:.1f} ms "
            f"| {best / ours:.2f}x | {peers[EAGER] / ours:.2f}x | {against_dense} |"
        )
    row = rows[0]
    lines += [
        "",
        f"{machine_line(row)}. float32, medians, warm caches, all peers in turns in one process. sgemm "
        f"{sgemm_gflops(rows):.1f} GFLOP/s, FMA peak {row['fma_gflops']} GFLOP/s"
        + (f", of float32 made of bfloat16 in AMX {amx} GFLOP/s." if (amx := row.get("amx_fp32_gflops")) else "."),
    ]
    return "\n".join(lines)


def int8_table(rows: list[Row]) -> str:
    """Markdown: packedbert in int8 against the best int8 peer, itself in float32, and dense eager PyTorch."""
    int8, fp32 = milliseconds(rows, "packed", "hot", "int8"), milliseconds(rows, "packed", "hot")
    dense = milliseconds(rows, "dense", "hot")
    lines = [
        "| batch, length | packedbert int8 | time / L | best int8 peer | than it | than our float32 | than dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, peers in int8.items():
        ours = peers[OURS]
        rivals = [(ms, peer) for peer, ms in peers.items() if peer != OURS]
        best, name = min(rivals, default=(float("nan"), "none ran"))
        against_dense = f"{dense[cell][EAGER] / ours:.2f}x" if cell in dense else "-"
        lines.append(
            f"| {cell[0]}, {cell[1]} | {ours:.1f} ms | {over_l(rows, cell, OURS, 'hot', 'int8'):.2f} | {name}, "
            f"{best:.1f} ms | {best / ours:.2f}x | {fp32[cell][OURS] / ours:.2f}x | {against_dense} |"
        )
    row = rows[0]
    if row["int8_gops"]:
        ratio = float(row["int8_gops"]) / float(row["fma_gflops"])
        amx = row.get("amx_int8_gops")
        more = f", in AMX at {amx} GOP/s." if amx else "." if "vnni" in row["isa"] else ". It has no VNNI."
        lines += [
            "",
            f"The same run. On registers alone this machine's int8 products run at {row['int8_gops']} GOP/s, "
            f"{ratio:.2f}x its float32 rate{more}",
        ]
    return "\n".join(lines) if int8 else ""


def floor_table(rows: list[Row]) -> str:
    """Markdown: with cold caches, what of a call of few tokens is not the kernels'; the fewest tokens of the run."""
    cell = min(milliseconds(rows, "floor", "cold", "any"), default=None)
    if cell is None:
        return ""
    lines = [
        f"| {cell[0]}, {cell[1]}, cold caches | packedbert | calling the model | reading its weights | the two |",
        "|---|---|---|---|---|",
    ]
    (calling,) = milliseconds(rows, "floor", "cold", "any")[cell].values()
    for precision in ("fp32", "int8"):
        ours = milliseconds(rows, "packed", "cold", precision)[cell][OURS]
        (reading,) = milliseconds(rows, "floor", "cold", precision)[cell].values()
        to_l = over_l(rows, cell, OURS, "cold", precision) / ours
        lines.append(
            f"| {precision} | {ours:.2f} ms, {ours * to_l:.2f} L | {calling:.2f} ms | {reading:.2f} ms "
            f"| {(calling + reading) * to_l:.2f} L |"
        )
    return "\n".join(lines)


def accuracy_table(rows: list[Row]) -> str:
    """Markdown: what int8 costs in answers."""
    lines = ["| real models | precision | F1 or Spearman | difference from float32 |", "|---|---|---|---|"]
    for row in rows:
        base = next(r for r in rows if (r["data"], r["peer"], r["precision"]) == (row["data"], OURS, "fp32"))
        difference = float(row["value"]) - float(base["value"])
        lines.append(
            f"| {row['data']}, {row['examples']} examples | {row['peer']} {row['precision']} "
            f"| {float(row['value']):.2f} | {difference:+.2f} |"
        )
    return "\n".join(lines)


def prune_table(rows: list[Row]) -> str:
    """Markdown: what pruning costs in answers, and gains in speed."""
    lines = [
        "| model | EM | F1 | than dense, same kernels | than dense, eager | heads | FFN rows | trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        heads, widths = (sum(map(int, row[name].split())) for name in ("heads", "ffn_widths"))
        lines.append(
            f"| {row['model']} | {float(row['exact_match']):.2f} | {float(row['f1']):.2f} "
            f"| {float(row['times_dense_packedbert']):.2f}x | {float(row['times_dense_eager']):.2f}x "
            f"| {heads} | {widths:,} | {float(row['training_minutes']):.0f} min |"
        )
    checked = next(row for row in rows if row["answers_as_masked"])
    lines.append(
        f"\nSQuAD v1.1's dev set, or a part of it; speed at batch {rows[0]['batch']}, length {rows[0]['length']}, "
        f"float32. Training: {rows[0]['recipe']}. The packed model gives the masked one's answer to "
        f"{checked['answers_as_masked']} questions; logits differ by {checked['logits_error']} at most. "
        f"{machine_line(rows[0])}"
    )
    return "\n".join(lines)


def machine_table(rows: list[Row]) -> str:
    """Markdown: all of model.csv that README has for the first machine, shorter, for another one.

    "of its peak" is the rate of all that a forward does, norms and softmax included, over that of products on registers
    alone: in float32 FMAs, in int8 what the processor has for it.
    """
    lines = [
        "| batch, length | float32 | time / L | of its peak | than best peer | than dense "
        "| int8 | time / L | of its peak | than best int8 peer | than dense |",
        "|---" * 11 + "|",
    ]
    peaks = {"fp32": float(rows[0]["fma_gflops"]), "int8": float(rows[0]["int8_gops"] or "nan")}
    flop = {(int(row["batch"]), int(row["length"])): float(row["gflop"]) for row in rows if row["model"] == "packed"}
    dense = {cache: milliseconds(rows, "dense", cache) for cache in ("hot", "cold")}
    cells = [(cell, "hot") for cell in flop] + [(min(flop), "cold")]
    for cell, cache in cells:
        line = f"| {cell[0]}, {cell[1]}{', cold caches' if cache == 'cold' else ''} "
        for precision, peak in peaks.items():
            peers = milliseconds(rows, "packed", cache, precision)[cell]
            ours = peers.pop(OURS)
            line += (
                f"| {ours:.1f} ms | {over_l(rows, cell, OURS, cache, precision):.2f} "
                f"| {100 * flop[cell] / (1e-3 * ours) / peak:.0f}% "
                f"| {min(peers.values()) / ours:.2f}x | {dense[cache][cell][EAGER] / ours:.1f}x "
            )
        lines.append(line + "|")
    row = rows[0]
    lines += [
        "",
        f"{machine_line(row)}. sgemm {sgemm_gflops(rows):.1f} GFLOP/s, FMA peak {row['fma_gflops']} GFLOP/s, int8 peak "
        f"{row['int8_gops']} GOP/s.",
    ]
    return "\n".join(lines)


def gpu_table(rows: list[Row]) -> str:
    """Markdown: the whole model on a GPU, called as it is and recorded in a graph, against the best of PyTorch's."""
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["case"].startswith("model "):
            cells[row["case"].removeprefix("model ").replace("x", ", ")][row["peer"]] = float(row["median_ms"])
    lines = [
        "| batch, length | packedbert, CUDA graph | best of PyTorch | than it | than dense, CUDA graph "
        "| by Triton | without graphs | than PyTorch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, peers in cells.items():
        ours, eager = peers[f"{OURS}, CUDA graph"], peers[f"{OURS}, eager"]
        rivals = {name: ms for name, ms in peers.items() if name.startswith("PyTorch") and "dense" not in name}
        name, best = min(rivals.items(), key=lambda item: item[1])
        lines.append(
            f"| {cell} | {ours:.2f} ms | {name.removeprefix('PyTorch, ')}, {best:.2f} ms | {best / ours:.2f}x "
            f"| {peers['PyTorch, dense, CUDA graph'] / ours:.2f}x | {peers[f'{OURS}, Triton, CUDA graph']:.2f} ms "
            f"| {eager:.2f} ms | {peers['PyTorch, eager'] / eager:.2f}x |"
        )
    row = rows[0]
    lines.append(
        f"\n{row['gpu']}, {row['dtype']}, {row['date']}; torch {row['torch']}, transformers {row['transformers']}. "
        f"Medians, in turns. cuBLAS reaches {row['peak_tflops']} TFLOP/s there."
    )
    return "\n".join(lines)


def dense_table(rows: list[Row]) -> str:
    """Markdown: the same kernels on the unpruned model."""
    lines = ["| unpruned BERT-base | packedbert | best peer | than it |", "|---|---|---|---|"]
    for cell, peers in milliseconds(rows, "dense", "hot").items():
        rivals = {peer: ms for peer, ms in peers.items() if peer != OURS}
        if len(rivals) > 1:
            name, best = min(rivals.items(), key=lambda item: item[1])
            ours = peers[OURS]
            lines.append(f"| {cell[0]}, {cell[1]} | {ours:.1f} ms | {name}, {best:.1f} ms | {best / ours:.2f}x |")
    return "\n".join(lines) if len(lines) > 2 else ""


def usage_table(rows: list[Row]) -> str:
    """Markdown: what using it costs besides time."""
    lines = ["| besides speed | measured | limit |", "|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['value']} {row['unit']} | {row['limit']} {row['unit'] if row['limit'] else ''} |"
        for row in rows
    ]
    return "\n".join(lines)


def bars(axes: Any, values: dict[str, dict[Cell, float]], label: str) -> None:
    """Grouped bars: a group for each cell, a bar for each peer."""
    cells = list(dict.fromkeys(cell for by_cell in values.values() for cell in by_cell))
    width = 0.8 / len(values)
    for index, (peer, by_cell) in enumerate(values.items()):
        places = [place + index * width for place, cell in enumerate(cells) if cell in by_cell]
        drawn = axes.bar(places, [by_cell[cell] for cell in cells if cell in by_cell], width, label=peer)
        axes.bar_label(drawn, fmt="%.2f", fontsize=6)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(cells))], [f"{b}, {s}" for b, s in cells])
    axes.set_xlabel("batch, length")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)


def plot_model(rows: list[Row], file: Path) -> None:
    """time / L of every float32 peer, and how many times faster than dense eager PyTorch each is."""
    cells, dense = milliseconds(rows, "packed", "hot"), milliseconds(rows, "dense", "hot")
    peers = list(dict.fromkeys(peer for by_peer in cells.values() for peer in by_peer))
    int8 = milliseconds(rows, "packed", "hot", "int8")
    figure, (above, below, *more) = plt.subplots(3 if int8 else 2, figsize=(10, 12 if int8 else 8))
    bars(
        above,
        {peer: {cell: over_l(rows, cell, peer, "hot") for cell in cells if peer in cells[cell]} for peer in peers},
        "time / L (1: PyTorch's sgemm rate)",
    )
    above.axhline(1, color="black", linewidth=0.8, linestyle="--")
    above.set_title(
        f"The seed's structure in float32: {rows[0]['cpu']}, {rows[0]['isa']}, {rows[0]['threads']} threads"
    )
    if dense:
        speed = {
            peer: {cell: dense[cell][EAGER] / ms[peer] for cell, ms in cells.items() if peer in ms and cell in dense}
            for peer in peers
        }
        bars(below, speed, "times faster than dense BERT-base, eager")
    for axes in more:
        rivals = list(dict.fromkeys(peer for by_peer in int8.values() for peer in by_peer))
        values = {
            f"{peer} int8": {cell: over_l(rows, cell, peer, "hot", "int8") for cell in int8 if peer in int8[cell]}
            for peer in rivals
        }
        values |= {f"{OURS} fp32": {cell: over_l(rows, cell, OURS, "hot") for cell in int8}}
        bars(axes, values, "int8: time / L")
    save(figure, file)


def plot_scaling(rows: list[Row], file: Path) -> None:
    """Time against batch, length, real tokens and density."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 8))

    def points(series: str, peer: str) -> list[Row]:
        return [row for row in rows if (row["series"], row["peer"]) == (series, peer)]

    batch, length, density = points("batch", OURS), points("length", OURS), points("density", OURS)
    tokens = [int(row["tokens"]) for row in batch]
    per_token = [1e3 * float(row["median_ms"]) / n for row, n in zip(batch, tokens, strict=True)]
    axes[0, 0].semilogx([int(row["batch"]) for row in batch], per_token, "o-", base=2)
    top = 1.2 * max(per_token)
    axes[0, 0].set(xlabel=f"batch, length {batch[0]['length']}", ylabel="us per token", ylim=(0, top))
    lengths, ms = [int(row["length"]) for row in length], [float(row["median_ms"]) for row in length]
    rate = ms[-1] / float(length[-1]["gflop"])
    axes[0, 1].plot(lengths, ms, "o-", label=OURS)
    expected = [rate * float(row["gflop"]) for row in length]
    axes[0, 1].plot(lengths, expected, "--", label="as the operations grow")
    axes[0, 1].set(xlabel="length, batch 1", ylabel="ms")
    axes[0, 1].legend()
    for peer in (OURS, EAGER):
        fill = points("fill", peer)
        x, y = [int(row["tokens"]) for row in fill], [float(row["median_ms"]) for row in fill]
        axes[1, 0].plot(x, y, "o-", label=peer)
    axes[1, 0].set(xlabel="real tokens in a padded batch", ylabel="ms", ylim=(0, None))
    axes[1, 0].legend()
    for peer in (OURS, EAGER) if density else ():
        shown = points("density", peer)
        x = [int(row["structure"].partition("%")[0]) for row in shown]
        axes[1, 1].plot(x, [float(row["median_ms"]) for row in shown], "o-", label=peer)
    axes[1, 1].set(xlabel="% of heads and FFN rows left", ylabel="ms", ylim=(0, None))
    axes[1, 1].legend()
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a PNG."""
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def between(readme: Path, text: str, name: str, body: str) -> str:
    """`text` with something else between the two markers of that name."""
    begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise click.ClickException(f"{readme}: expected the markers {begin} and {end} around the tables, found none")
    return f"{before}{begin}\n{body}\n{end}{after}"


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), default=RESULTS, show_default=True)
@click.option("--readme", type=click.Path(path_type=Path, exists=True), default=ROOT / "README.md", show_default=True)
def main(results: Path, readme: Path) -> None:
    """Write the README's tables and the plots from the CSVs that are there."""
    tables = []
    if (file := results / "model.csv").exists():
        rows = read(file)
        tables += [table(rows), dense_table(rows), int8_table(rows), floor_table(rows)]
        plot_model(rows, file.with_suffix(".png"))
    if (file := results / "accuracy.csv").exists():
        tables.append(accuracy_table(read(file)))
    if (file := results / "usage.csv").exists():
        tables.append(usage_table(read(file)))
    if (file := results / "scaling.csv").exists():
        plot_scaling(read(file), file.with_suffix(".png"))
    text = between(readme, readme.read_text(), "benchmarks", "\n\n".join(part for part in tables if part))
    if others := sorted(results.glob("*/model.csv")):
        text = between(readme, text, "other machines", "\n\n".join(machine_table(read(file)) for file in others))
    if (file := results / "gpu.csv").exists():
        text = between(readme, text, "gpu", gpu_table(read(file)))
    if (file := results / "prune.csv").exists():
        text = between(readme, text, "pruning", prune_table(read(file)))
    readme.write_text(text)
    click.echo(f"written: {readme}, and the plots in {results}")


if __name__ == "__main__":
    main()
