"""Against what the seed model ran on: transformers 4's pipeline and nn_pruning's optimize_model.

They live in a venv of their own, run by subprocess: `nox -s oracle` makes it, or PACKEDBERT_ORACLE_PYTHON names the
python of one with transformers 4.57.6 and nn_pruning 0.1.2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from models import tiny_bert, tiny_config
from safetensors.torch import load_file, save_file

import packedbert
from packedbert.squad import load_squad

ORACLE = os.environ.get("PACKEDBERT_ORACLE_PYTHON")
VERSIONS = {"transformers": "4.57.6", "nn_pruning": "0.1.2"}

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not ORACLE, reason="opt-in: PACKEDBERT_ORACLE_PYTHON names no python with transformers 4.57.6 and nn_pruning"
    ),
]


def ask(folder: Path, **job):
    """Run a job in the oracle's venv; what it reports."""
    file = folder / "job.json"
    job = {"out": str(folder / "out"), "report": str(folder / "report.json"), **job}
    file.write_text(json.dumps(job))
    worker = Path(__file__).with_name("oracle_worker.py")
    # -I: no PYTHONPATH and no folder of ours on its path, so that it cannot meet our packages.
    done = subprocess.run([ORACLE, "-I", worker, file], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{ORACLE} failed:\n{done.stderr[-4000:]}"
    return json.loads(Path(job["report"]).read_text())


def test_the_oracle_is_what_we_think(tmp_path):
    assert ask(tmp_path, job="versions") == VERSIONS


# ------------------------------------------------------------------------------------------------- the pipeline


def question_answering_items(shared):
    """50 real questions; every third with a context of several paragraphs, and with various options."""
    data = load_squad(shared / "data" / "squad-dev-v1.1-a.json.gz")["data"]
    places = [(a, p, q) for a, p, q in _places(data) if q == p % 3]
    items = []
    for number, (a, p, q) in enumerate(places[:: len(places) // 50][:50]):
        paragraphs = data[a]["paragraphs"]
        item = {"question": paragraphs[p]["qas"][q]["question"], "context": paragraphs[p]["context"]}
        if number % 3 == 0:
            first = max(0, min(p - 2, len(paragraphs) - 6))
            item["context"] = "\n\n".join(paragraph["context"] for paragraph in paragraphs[first : first + 6])
        item |= [
            {},
            {"top_k": 3},
            {"handle_impossible_answer": True},
            {"top_k": 3, "align_to_words": False},
            {"max_seq_len": 160, "doc_stride": 40, "max_answer_len": 30, "top_k": 3},
        ][number % 5]
        items.append(item)
    return items


def _places(data):
    for a, article in enumerate(data):
        for p, paragraph in enumerate(article["paragraphs"]):
            for q in range(len(paragraph["qas"])):
                yield a, p, q


@pytest.fixture(scope="module")
def pipeline_answers(shared, tmp_path_factory):
    """(items, the pipeline's answers)."""
    items = question_answering_items(shared)
    model = str(shared / "models" / "minilm-qa")
    return items, ask(tmp_path_factory.mktemp("pipeline"), job="qa", model=model, items=items)


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_the_answers_are_the_pipelines(shared, pipeline_answers, patched):
    items, expected = pipeline_answers
    folder = shared / "models" / "minilm-qa"
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)
    if patched:
        packedbert.patch_model(model)
    answerer = packedbert.QuestionAnswerer(model, transformers.AutoTokenizer.from_pretrained(folder))
    assert len(items) == len(expected) == 50
    several, worst = 0, 0.0
    for item, theirs in zip(items, expected, strict=True):
        windows = []
        ours = answerer(**item, batch_size=4, progress=lambda done, total, seen=windows: seen.append(total))
        several += windows[-1] > 1
        assert isinstance(ours, list) == isinstance(theirs, list)
        if isinstance(ours, dict):
            ours, theirs = [ours], [theirs]
        assert [[answer[key] for key in ("answer", "start", "end")] for answer in ours] == [
            [answer[key] for key in ("answer", "start", "end")] for answer in theirs
        ]
        worst = max(worst, *(abs(a["score"] - b["score"]) for a, b in zip(ours, theirs, strict=True)))
    assert worst < 1e-4
    print(f"{len(items)} questions, {several} with several windows: scores differ by at most {worst:.1e}")
    assert several >= 20


# --------------------------------------------------------------------------------------------------- nn_pruning


def compare(folder: Path, checkpoint: Path, vocab_size: int, length: int):
    """(worst differences of ours and nn_pruning's logits from the masked model's; ours from nn_pruning's; reports).

    Differences are over the real tokens of four sequences: whole, right-padded, left-padded, with a hole.
    """
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, length * 2 // 3 :] = 0
    mask[2, : length // 4] = 0
    mask[3, length // 3 : length // 2] = 0
    inputs = {
        "input_ids": torch.randint(vocab_size, (4, length), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(2, (4, length), generator=generator),
    }
    save_file(inputs, folder / "inputs.safetensors")
    kept = ask(folder, job="optimize", model=str(checkpoint), inputs=str(folder / "inputs.safetensors"))
    theirs = load_file(folder / "out")
    model = packedbert.load(checkpoint, task="question-answering")
    with torch.no_grad():
        output = model(**inputs)
    ours = {"start": output.start_logits, "end": output.end_logits}

    def worst(first, second):
        return max(float((first(side) - second(side))[mask == 1].abs().max()) for side in ours)

    def masked(side):
        return theirs[f"masked.{side}"]

    def optimized(side):
        return theirs[f"optimized.{side}"]

    differences = {
        "ours from masked": worst(ours.get, masked),
        "theirs from masked": worst(optimized, masked),
        "ours from theirs": worst(ours.get, optimized),
    }
    print(checkpoint.name, differences)
    return differences, kept, model.packedbert_report


def test_the_seeds_structure_gives_the_logits_of_nn_pruning(shared, tmp_path):
    """Nothing is folded here: the biases of removed rows are zero, as in the published checkpoint."""
    script = shared / "reference" / "make_reference_checkpoint.py"
    checkpoint = tmp_path / "seed"
    subprocess.run([sys.executable, script, checkpoint, "--seed", "0"], check=True, capture_output=True)
    structure = json.loads((shared / "reference" / "seed_structure.json").read_text())
    differences, kept, report = compare(tmp_path, checkpoint, structure["vocab_size"], length=96)
    assert differences["ours from theirs"] < 1e-5
    assert differences["ours from masked"] < 1e-5
    assert kept["heads"] == [len(layer.heads) for layer in report.layers] == structure["heads_kept"]
    assert kept["ffn"] == [layer.ffn_width for layer in report.layers] == structure["ffn_width"]


def tiny_checkpoint(folder: Path, change) -> Path:
    """12 layers, which optimize_model is written for; `change` prunes a layer in place."""
    model = tiny_bert("BertForQuestionAnswering", tiny_config(num_hidden_layers=12))
    with torch.no_grad():
        change(model.bert.encoder.layer[5])
    model.save_pretrained(folder / change.__name__)
    return folder / change.__name__


def ffn_row_without_weights(layer):
    layer.intermediate.dense.weight[7] = 0
    layer.intermediate.dense.bias[7] = 2
    layer.output.dense.weight[:, 7] = torch.linspace(-1, 1, 32)  # the same for all would vanish in the LayerNorm


def all_heads_without_weights(layer):
    for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
        part.weight.zero_()


def one_head_without_a_query(layer):
    layer.attention.self.query.weight[8:16] = 0


@pytest.mark.parametrize(
    ("change", "our_heads", "their_heads", "ffn_width"),
    [
        # nn_pruning drops the constant gelu(2) that the row adds; we fold it into the output's bias.
        (ffn_row_without_weights, (0, 1, 2, 3), 4, 39),
        # nn_pruning keeps a head so that there is one, and drops what the value biases of the others add.
        (all_heads_without_weights, (), 1, 40),
        # Such a head still averages its values; nn_pruning removes it, we keep it.
        (one_head_without_a_query, (0, 1, 2, 3), 3, 40),
    ],
)
def test_where_nn_pruning_changes_the_model_and_we_do_not(tmp_path, change, our_heads, their_heads, ffn_width):
    checkpoint = tiny_checkpoint(tmp_path, change)
    differences, kept, report = compare(tmp_path, checkpoint, vocab_size=61, length=24)
    assert differences["ours from masked"] < 1e-5
    assert differences["theirs from masked"] > 1e-3
    assert report.layers[5].heads == our_heads
    assert kept["heads"][5] == their_heads
    assert report.layers[5].ffn_width == kept["ffn"][5] == ffn_width


def test_where_nothing_is_folded_even_a_tiny_model_is_the_same(tmp_path):
    """So the differences above come from what is folded, not from the size or from noise."""

    def one_row_and_its_bias(layer):
        layer.intermediate.dense.weight[7] = 0
        layer.intermediate.dense.bias[7] = 0

    checkpoint = tiny_checkpoint(tmp_path, one_row_and_its_bias)
    differences, _, _ = compare(tmp_path, checkpoint, vocab_size=61, length=24)
    assert max(differences.values()) < 1e-5
