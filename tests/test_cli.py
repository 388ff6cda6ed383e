"""The `packedbert` command: every subcommand's happy path, JSON, and errors without tracebacks."""

import gzip
import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from models import prune, some_pruning, tiny_bert, tiny_config

import packedbert
from packedbert import bench, dispatch
from packedbert.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "who", "where", "?", "."]
CONTEXT = "The cat sat on a mat."


def run(*arguments, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny question-answering model with its tokenizer, dense on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(vocab_size=len(WORDS))
    prune(tiny_bert("BertForQuestionAnswering", config), *some_pruning(config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def squad(tmp_path):
    """Three questions in SQuAD's format."""
    qas = [{"id": str(i), "question": "Where?", "answers": [{"text": "mat", "answer_start": 17}]} for i in range(3)]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    return file


def parsed(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_qa_from_options_files_and_standard_input(checkpoint, tmp_path):
    (tmp_path / "context.txt").write_text(CONTEXT)
    ask = ["qa", "--model", checkpoint, "-q", "Where?", "--json"]
    expected = parsed(run(*ask, "-c", CONTEXT))
    assert expected[0]["question"] == "Where?"
    answer = expected[0]["answers"][0]
    assert CONTEXT[answer["start"] : answer["end"]] == answer["answer"] != ""
    assert parsed(run(*ask, "--context-file", tmp_path / "context.txt")) == expected
    assert parsed(run(*ask, input=CONTEXT)) == expected
    assert parsed(run(*ask, "-c", "-", input=CONTEXT)) == expected
    item = {"question": "Where?", "context": CONTEXT}
    (tmp_path / "list.json").write_text(json.dumps([item, item]))
    (tmp_path / "lines.jsonl").write_text(json.dumps(item) + "\n" + json.dumps(item) + "\n")
    for name in ("list.json", "lines.jsonl"):
        rows = parsed(run("qa", "--model", checkpoint, "--input", tmp_path / name, "--json"))
        assert [row["answers"][0]["answer"] for row in rows] == [answer["answer"]] * 2
    assert len(parsed(run(*ask, "-c", CONTEXT, "--top-k", 3))[0]["answers"]) == 3
    shown = run("qa", "--model", checkpoint, "-q", "Where?", "-c", CONTEXT)
    assert shown.exit_code == 0
    assert "%" in shown.output


def test_qa_reads_a_question_from_standard_input(checkpoint, tmp_path):
    (tmp_path / "context.txt").write_text("\ufeff" + CONTEXT, encoding="utf-8")
    ask = ["qa", "--model", checkpoint, "-q", "-", "--json"]
    rows = parsed(run(*ask, "--context-file", tmp_path / "context.txt", input="Where?\n"))
    assert rows[0]["question"] == "Where?"
    assert rows == parsed(run(*ask, "-c", CONTEXT, input="Where?"))
    refused = run(*ask, input="Where?")
    assert refused.exit_code == 2
    assert "standard input is the question" in refused.output


def test_qa_input_may_be_one_object_over_several_lines(checkpoint, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"question": "Where?", "context": CONTEXT}, indent=2))
    assert len(parsed(run("qa", "--model", checkpoint, "--input", tmp_path / "one.json", "--json"))) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"question": "a", "context": "b"}\n\n{"question": "a"}', "line 3 is something else: KeyError('context')"),
        (b'[{"question": "a", "context": "b"}, 7]', "entry 1 is something else"),
        (b"[]", "expected questions, got none"),
        (b"7", "line 1 is something else"),
        (b"\xff\xfe", "expected UTF-8 text"),
    ],
)
def test_qa_input_errors_name_the_place(checkpoint, tmp_path, content, text):
    (tmp_path / "bad.jsonl").write_bytes(content)
    result = run("qa", "--model", checkpoint, "--input", tmp_path / "bad.jsonl")
    assert result.exit_code == 1
    assert text in result.output
    assert "bad.jsonl" in result.output


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    """transformers would answer with a random head."""
    tiny_bert("BertForMaskedLM").save_pretrained(tmp_path)
    for more in ([], ["--no-patch"]):
        result = run("eval", "--model", tmp_path, "--data", "SQUAD", *more)
        assert result.exit_code == 1
    result = run("qa", "--model", tmp_path, "-q", "Who?", "-c", "x")
    assert result.exit_code == 1
    assert "expected a question-answering checkpoint, got BertForMaskedLM" in result.output


def test_eval_without_questions(checkpoint, tmp_path):
    (tmp_path / "empty.json").write_text('{"data": []}')
    result = run("eval", "--model", checkpoint, "--data", tmp_path / "empty.json")
    assert result.exit_code == 1
    assert "expected questions, got none" in result.output


def test_what_nobody_foresaw_is_one_line_too(monkeypatch):
    def fail():
        raise ZeroDivisionError("one\n  two")

    monkeypatch.setattr(packedbert, "backends", fail)
    result = run("backends")
    assert result.exit_code == 1
    assert result.stderr == "packedbert: ZeroDivisionError: one two (a bug? --debug shows where)\n"
    assert isinstance(run("--debug", "backends").exception, ZeroDivisionError)


def test_ctrl_c_ends_cleanly(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(packedbert, "backends", interrupt)
    result = run("backends")
    assert result.exit_code == 1
    assert result.stderr.strip() == "Aborted!"


def test_inspect_dense_and_packed(checkpoint, tmp_path):
    report = parsed(run("inspect", checkpoint, "--json"))
    assert report["layers"][1]["heads"] == []
    assert "stored parameters" in run("inspect", checkpoint).output
    packedbert.load(checkpoint).save_pretrained(tmp_path)
    packed = parsed(run("inspect", tmp_path, "--json"))
    assert [layer["ffn_width"] for layer in packed["layers"]] == [layer["ffn_width"] for layer in report["layers"]]


def test_eval(checkpoint, squad, tmp_path):
    everything = parsed(run("eval", "--model", checkpoint, "--data", squad, "--json"))
    assert everything["questions"] == 3
    assert everything["backend"] == "cpu"
    zipped = tmp_path / "squad.json.gz"
    zipped.write_bytes(gzip.compress(squad.read_bytes()))
    some = parsed(run("eval", "--model", checkpoint, "--data", zipped, "--limit", 2, "--json"))
    assert some["questions"] == 2
    stock = parsed(run("eval", "--model", checkpoint, "--data", squad, "--no-patch", "--json"))
    assert (stock["exact_match"], stock["f1"]) == (everything["exact_match"], everything["f1"])
    assert stock["backend"] == "stock transformers"
    assert "questions/s" in run("eval", "--model", checkpoint, "--data", squad).output


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_eval_of_a_real_model(shared, precision):
    model, data = shared / "models" / "minilm-qa", shared / "data" / "squad-dev-v1.1-a.json.gz"
    got = parsed(run("eval", "--model", model, "--data", data, "--limit", 50, "--precision", precision, "--json"))
    assert got["f1"] > 60


def test_precisions(checkpoint, squad):
    arguments = ("eval", "--model", checkpoint, "--data", squad)
    assert parsed(run(*arguments, "--precision", "int8", "--json"))["backend"] == "cpu"
    assert "one of fp32, bf16, fp16, int8, got 'int4'" in run(*arguments, "--precision", "int4").output
    assert "leave out --no-patch" in run(*arguments, "--precision", "int8", "--no-patch").output


def test_bench(tmp_path):
    arguments = ("bench", "--structure", "tiny", "--batch", 2, "--length", 8, "--runs", 3)
    rows = parsed(run(*arguments, "--json", "--csv", tmp_path / "out.csv"))
    assert [row["model"] for row in rows] == ["dense BERT, eager", "packed, eager", "packedbert"]
    assert all(0 < row["quartile_1_ms"] <= row["median_ms"] <= row["quartile_3_ms"] for row in rows)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 4
    assert "x packed eager" in run(*arguments).output
    assert all((row["backend"], row["structure"]) == ("cpu", "tiny") for row in rows)
    assert rows[2]["times_dense"] == pytest.approx(rows[0]["median_ms"] / rows[2]["median_ms"])
    assert [shape["name"] for shape in parsed(run("bench", "--list", "--json"))] == list(bench.STRUCTURES)
    listed = run("bench", "--list").output
    assert all(name in listed for name in bench.STRUCTURES)


def test_demo(checkpoint):
    got = parsed(run("demo", "--structure", "tiny", "--json"))
    assert got["difference"]["logits"] < 1e-5
    assert got["parameters"]["packed"] < got["parameters"]["stored"] < got["parameters"]["dense"]
    assert "largest difference" in run("demo", "--structure", "tiny").output
    answers = parsed(run("demo", "--structure", "tiny", "--model", checkpoint, "--json"))["answers"]
    assert [set(answer) for answer in answers] == [
        {"question", "answer", "score", "start", "end", "expected", "right"}
    ] * 10


def test_the_demos_own_model_answers_real_questions():
    """At least eight of ten; README and the demo say which it misses."""
    answers = parsed(run("demo", "--structure", "tiny", "--json"))["answers"]
    assert {"Where is the Eiffel Tower located?", "Who is Frederic Chopin?"} <= {row["question"] for row in answers}
    right = [row for row in answers if row["right"]]
    assert len(right) >= 8, answers
    assert all(row["answer"] and 0 < row["score"] <= 1 for row in answers)
    shown = run("demo", "--structure", "tiny").output
    assert f"{len(right)} of 10 right" in shown
    assert all(f">>{row['answer']}<<" in shown.replace("\n", " ") or row["answer"] in shown for row in answers)


def test_the_demos_model_is_small_and_says_where_it_comes_from():
    from packedbert.cli.demo import DEMO_MODEL

    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= 20e6
    card = (DEMO_MODEL / "README.md").read_text()
    assert "CC BY-SA 4.0" in card
    assert "Apache-2.0" in card


def test_demo_without_its_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("packedbert.cli.demo.DEMO_MODEL", tmp_path)
    result = run("demo", "--structure", "tiny")
    assert result.exit_code == 1
    assert "expected the demo's model there, found none" in " ".join(result.output.split())


def test_prune_writes_both_formats_and_goes_on_after_an_interruption(dense, squad, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["prune", "--model", dense, "--data", squad, "-o", out, "--target", "1.3", "--cost", "flops", "--json"]
    made = parsed(run(*command))
    assert made["speedup"] >= 1.3
    for folder in ("pruned", "packed"):
        assert made[folder] == str(out / folder)
        got = parsed(run("inspect", made[folder], "--json"))["layers"]
        assert [{"heads": len(layer["heads"]), "ffn_width": layer["ffn_width"]} for layer in got] == made["layers"]
        assert parsed(run("eval", "--model", made[folder], "--data", squad, "--json"))["questions"] == 3
    # The same command again, now with training: what was pruned is there, and training is interrupted.
    trained = [*command, "--epochs", "3"]
    step = packedbert.recover._Training._train_step
    monkeypatch.setattr(packedbert.recover._Training, "_train_step", interrupted_after(2, step))
    stopped = run(*trained)
    assert stopped.exit_code == 1
    assert "the same command goes on" in " ".join(stopped.output.split())
    assert (out / "state" / "recovery.pt").exists()
    monkeypatch.setattr(packedbert.recover._Training, "_train_step", step)
    resumed = run(*trained)
    assert json.loads(resumed.stdout)["layers"] == made["layers"]
    assert "going on with what" in " ".join(resumed.stderr.split())
    shown = run(*trained[:-3], "--epochs", "3")
    assert "expected speed-up over the dense model" in shown.output
    other = run(*command, "--seed", "1")
    assert other.exit_code == 1
    assert "with another seed; delete it" in " ".join(other.output.split())


def interrupted_after(steps, call):
    done = []

    def interrupt(*arguments):
        done.append(None)
        if len(done) > steps:
            raise KeyboardInterrupt
        call(*arguments)

    return interrupt


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny dense question-answering model with its tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    config = tiny_config(vocab_size=len(WORDS), intermediate_size=96)
    tiny_bert("BertForQuestionAnswering", config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--target": "90"}, "target: expected at most"),
        ({"--target": "1"}, "target: expected a speed-up of more than 1"),
        ({"--data": "/nowhere.json"}, "expected a SQuAD file"),
        ({"--model": "PACKED"}, "got one that is packed already"),
        ({"-o": "FILE"}, "File exists"),
        ({"--method": "luck"}, "method: expected one of fisher, magnitude"),
        ({"--cost": "luck"}, "cost_model: expected one of measured, flops"),
        ({"--precision": "int3"}, "precision: expected one of"),
    ],
)
def test_prune_refuses(dense, squad, tmp_path, changes, text):
    if changes.get("--model") == "PACKED":
        parsed(
            run(
                "prune", "--model", dense, "--data", squad, "-o", tmp_path, "--cost", "flops", "--target", 1.2, "--json"
            )
        )
        changes = {"--model": tmp_path / "packed"}
    if changes.get("-o") == "FILE":
        changes = {"-o": squad}
    options = {
        "--model": dense,
        "--data": squad,
        "-o": tmp_path / "out",
        "--target": "1.3",
        "--cost": "flops",
        **changes,
    }
    result = run("prune", *(part for option in options.items() for part in option))
    assert result.exit_code == 1, result.output
    assert text in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "pruned").exists()


def test_backends_and_help():
    assert "reference" in run("backends").output
    for command in ("qa", "inspect", "prune", "eval", "bench", "demo", "backends"):
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert "packedbert " in shown.output or command == "backends"
    assert ", ".join(dispatch.BACKENDS) in " ".join(run("qa", "--help").output.split())
    assert packedbert.__version__ in run("--version").output


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("inspect", "/nowhere"), 1, "expected a folder with a checkpoint, found none"),
        (("qa", "--model", "MODEL", "-c", "x"), 2, "a question is needed"),
        (("qa", "--model", "MODEL", "-q", "Who?", "-c", " "), 0, ""),
        (("qa", "--model", "MODEL", "-q", "Who?", "-c", "x", "--top-k", "0"), 1, "top_k: expected at least 1, got 0"),
        (("qa", "--model", "MODEL", "-q", "Who?", "--input", "SQUAD"), 2, "--input brings questions"),
        (("qa", "--model", "MODEL", "--input", "SQUAD"), 1, "expected {"),
        (("qa", "--model", "MODEL", "-q", "Who?", "-c", "x", "--backend", "tpu"), 1, "expected one of auto, cpu"),
        (("eval", "--model", "MODEL", "--data", "/nowhere.json"), 1, "/nowhere.json: expected a SQuAD file"),
        (("eval", "--model", "MODEL", "--data", "MODEL/vocab.txt"), 1, "expected JSON"),
        (("bench", "--structure", "nothing"), 2, "expected one of"),
        (("bench", "--structure", "tiny", "--length", "65"), 2, "expected at most 64 tokens, got 65"),
    ],
)
def test_errors_are_one_line(checkpoint, squad, arguments, code, text):
    arguments = [argument.replace("MODEL", str(checkpoint)).replace("SQUAD", str(squad)) for argument in arguments]
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert text in result.output
    assert "Traceback" not in result.output


def test_debug_shows_the_error():
    result = run("--debug", "inspect", "/nowhere")
    assert isinstance(result.exception, FileNotFoundError)


def test_the_models_of_a_race_are_the_same_model():
    models = bench.build_models(bench.STRUCTURES["tiny"])
    batch = bench.random_batch(bench.STRUCTURES["tiny"], 3, 9, ragged=True)
    assert bench.exactness(models.patched, models.eager, batch).logits < 1e-5
    with torch.no_grad():
        models.eager.qa_outputs.weight.mul_(1.5)
    assert bench.exactness(models.patched, models.eager, batch).logits > 1e-3


def test_flops_are_those_of_the_products():
    """Counted once more, from the modules' shapes."""
    shape = bench.STRUCTURES["tiny"]
    model = bench.build_stock(shape)
    linear = sum(2 * 3 * 5 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = sum(2 * 2 * 3 * 5 * 5 * heads * 16 for heads in shape.heads)
    assert shape.flops(3, 5) == linear + attention


def test_the_seed_is_the_seed(shared):
    published = json.loads((shared / "reference" / "seed_structure.json").read_text())
    assert bench.SEED.heads == tuple(published["heads_kept"])
    assert bench.SEED.ffn_widths == tuple(published["ffn_width"])
    assert {str(i): list(heads) for i, heads in enumerate(bench.SEED.pruned_heads)} == published["pruned_heads"]
    others = json.loads((shared / "reference" / "published_structures.json").read_text())["models"]
    ours = {(shape.heads, shape.ffn_widths) for shape in bench.STRUCTURES.values()}
    assert {(tuple(m["heads_kept"]), tuple(map(int, m["ffn_width"]))) for m in others} <= ours


def test_interleaved_takes_turns():
    calls = []
    seconds = bench.interleaved({"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}, 3, 1)
    assert calls == [(name, index) for index in (-1, 0, 1, 2) for name in "ab"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
