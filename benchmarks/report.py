"""From CSV to what people read: `python benchmarks/report.py` writes the README's table and the plots.

The table stands between two marker comments in README.md; nothing else there is touched.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
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


def over_l(rows: list[Row], cell: Cell, peer: str, cache: str) -> float:
    """time / L of a peer on the packed model."""
    wanted = {"model": "packed", "precision": "fp32", "peer": peer, "cache": cache}
    wanted |= {"batch": str(cell[0]), "length": str(cell[1])}
    return next(float(row["time_over_L"]) for row in rows if wanted.items() <= row.items())


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
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "transformers", "onnxruntime", "openvino"))
    lines += [
        "",
        f"{row['cpu']}, {row['threads']} threads, {row['isa']}, {row['date']}; {versions}. float32, medians, warm "
        f"caches, all peers in turns in one process. sgemm {row['sgemm_gflops']} GFLOP/s, FMA peak "
        f"{row['fma_gflops']} GFLOP/s.",
    ]
    return "\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    """time / L of every float32 peer, cell by cell."""
    cells = milliseconds(rows, "packed", "hot")
    peers = list(dict.fromkeys(peer for by_peer in cells.values() for peer in by_peer))
    figure, axes = plt.subplots(figsize=(10, 4.5))
    width = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        here = [place + index * width for place, by_peer in enumerate(cells.values()) if peer in by_peer]
        heights = [over_l(rows, cell, peer, "hot") for cell, by_peer in cells.items() if peer in by_peer]
        bars = axes.bar(here, heights, width, label=peer)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(cells))], [f"{b}, {s}" for b, s in cells])
    axes.set_xlabel("batch, length")
    axes.set_ylabel("time / L (1: PyTorch's sgemm rate)")
    axes.set_title(
        f"The seed's structure in float32, {rows[0]['cpu']}, {rows[0]['threads']} threads, {rows[0]['date']}"
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--csv", "file", type=click.Path(path_type=Path, exists=True), default=RESULTS / "model.csv")
@click.option("--readme", type=click.Path(path_type=Path, exists=True), default=ROOT / "README.md")
def main(file: Path, readme: Path) -> None:
    """Write the README's table and the plots from a CSV of bench_model.py."""
    rows = read(file)
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise click.ClickException(f"{readme}: expected the markers {BEGIN} and {END} around the table, found none")
    readme.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")
    plot(rows, file.with_suffix(".png"))
    click.echo(f"written: {readme}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
