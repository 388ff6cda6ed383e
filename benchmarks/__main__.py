"""All benchmarks, and the README's tables and plots from them: `python benchmarks [--quick|--accuracy|--tiny]`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click

HERE = Path(__file__).parent

ACCURACY = "bench_accuracy.py"

#: Script and the options that it takes of --quick and --tiny.
SCRIPTS = {
    "bench_model.py": ("--quick", "--tiny"),
    "bench_ops.py": ("--tiny",),
    "bench_scaling.py": ("--tiny",),
    "bench_usage.py": ("--tiny",),
    ACCURACY: ("--tiny",),
}


@click.command()
@click.option("--quick", is_flag=True, help="A few minutes: bench_model.py alone, in fewer cells, no int8 peers.")
@click.option("--accuracy", is_flag=True, help="Only bench_accuracy.py: a quarter of an hour, not to be timed.")
@click.option("--tiny", is_flag=True, help="Toy sizes: checks that everything still runs.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
@click.option("--readme", type=click.Path(path_type=Path), default=HERE.parent / "README.md", show_default=True)
def main(quick: bool, accuracy: bool, tiny: bool, results: Path, readme: Path) -> None:
    """Run every benchmark in a process of its own, one after the other, on a machine that does nothing else."""
    start = time.perf_counter()
    asked = [flag for flag, given in (("--quick", quick), ("--tiny", tiny)) if given]
    chosen = [script for script in SCRIPTS if tiny or script != ACCURACY]
    if quick or accuracy:
        chosen = [ACCURACY] if accuracy else ["bench_model.py"]
    for script in chosen:
        options = [flag for flag in asked if flag in SCRIPTS[script]]
        out = results / f"{script.removeprefix('bench_').removesuffix('.py')}.csv"
        click.echo(f"\n{script} {' '.join(options)}")
        subprocess.run([sys.executable, HERE / script, *options, "--out", out], check=True)
    subprocess.run([sys.executable, HERE / "report.py", "--results", results, "--readme", readme], check=True)
    click.echo(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
