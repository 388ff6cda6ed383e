"""Makes the model that `packedbert demo` asks: `python benchmarks/make_demo_model.py --model DIR --train FILE`.

A pruned and trained BERT (bench_prune.py leaves one in its --work folder), calibrated on texts that it was trained
on, packed in int8 with int8 embeddings, with its tokenizer and a README.md that names sources and licence.
"""

from __future__ import annotations

import random
from pathlib import Path

import click
import torch
import transformers
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import packedbert
from packedbert.cli.demo import DEMO_MODEL

#: Texts for calibration.
TEXTS = 128

CARD = """---
license: cc-by-sa-4.0
language: en
pipeline_tag: question-answering
base_model: sentence-transformers/all-MiniLM-L6-v2
datasets: [squad]
---

# The model of `packedbert demo`

all-MiniLM-L6-v2 (Apache-2.0), fine-tuned for question answering on part of SQuAD v1.1 (CC BY-SA 4.0) and SQuADShifts'
new-wiki, pruned by `packedbert.prune_model` to twice its speed, trained again with the dense model as its teacher
(`packedbert.recover_model`), and stored in int8, embeddings included. Its weights derive from SQuAD: CC BY-SA 4.0, as
those who made SQuAD ask for (Rajpurkar et al. 2016, arXiv 1606.05250).

Left are {heads} of {all_heads} heads and {rows:,} of {all_rows:,} FFN rows. EM and F1 of the model that it was stored
from, and of those before it: packedbert's README, "Make one". It is small and briefly trained: for a demonstration.

    packedbert qa --model <this folder> -q "Who?" -c "..."
"""


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="Pruned and trained.")
@click.option("--train", required=True, type=click.Path(exists=True, path_type=Path), help="SQuAD format.")
@click.option("--out", default=DEMO_MODEL, show_default=True, type=click.Path(path_type=Path), help="Folder.")
def main(model: Path, train: Path, out: Path) -> None:
    """Calibrate, pack, save."""
    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model)
    bert = AutoModelForQuestionAnswering.from_pretrained(model, dtype=torch.float32).eval()
    pairs = [
        (question, context) for _, question, context in packedbert.squad.squad_examples(packedbert.load_squad(train))
    ]
    calibration = packedbert.calibrate(bert, random.Random(0).sample(pairs, TEXTS), tokenizer)
    packedbert.patch_model(bert, precision="int8", int8_embeddings=True, calibration=calibration, keep_original=False)
    bert.save_pretrained(out)
    tokenizer.save_pretrained(out)
    structure = bert.packedbert_report.structure
    card = CARD.format(
        heads=sum(len(layer.heads) for layer in structure.layers),
        all_heads=structure.num_heads * len(structure.layers),
        rows=sum(layer.ffn_width for layer in structure.layers),
        all_rows=structure.intermediate_size * len(structure.layers),
    )
    (out / "README.md").write_text(card)
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
