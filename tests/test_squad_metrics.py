"""EM and F1 as the official SQuAD v1.1 script computes them, and files in SQuAD's format."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packedbert import squad_metrics
from packedbert.squad import load_squad, squad_examples


def dataset(*golds):
    """One question, named by its place, for every list of gold answers; two questions to a paragraph."""
    entries = [
        {"id": str(index), "question": f"what is {index}?", "answers": [{"text": text} for text in texts]}
        for index, texts in enumerate(golds)
    ]
    paragraphs = [
        {"context": f"context {first}", "qas": entries[first : first + 2]} for first in range(0, len(entries), 2)
    ]
    return {"version": "1.1", "data": [{"title": "one", "paragraphs": paragraphs}]}


# ------------------------------------------------------------------------------------------------------- metrics


def test_the_golden_of_the_official_script(shared):
    with gzip.open(shared / "reference" / "squad_metric_golden.json.gz") as file:
        golden = json.load(file)
    data = load_squad(shared / "data" / "squad-dev-v1.1-a.json.gz")
    assert len(golden["predictions"]) == len(list(squad_examples(data))) == 5397
    assert squad_metrics(golden["predictions"], data) == golden["expected"]


@pytest.mark.parametrize(
    ("prediction", "golds", "exact_match", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the DENVER,  broncos!", ["Denver Broncos"], 1, 1),
        ("Broncos Denver", ["Denver Broncos"], 0, 1),  # order does not count in F1
        ("Denver", ["Denver Broncos"], 0, 2 / 3),
        ("Denver", ["Denver Broncos", "Carolina", "Denver"], 1, 1),  # the closest gold answer counts
        ("in the big Denver", ["Denver Broncos"], 0, 2 / 5),
        ("Denver Denver", ["Denver"], 0, 2 / 3),  # a word counts as often as the other text has it
        ("Carolina", ["Denver Broncos"], 0, 0),
        ("theory", ["the theory"], 1, 1),
        ("theory", ["ory"], 0, 0),  # an article is a word, not a prefix
        ("U.S.", ["US"], 1, 1),
        ("re-entry", ["re entry"], 0, 0),  # a removed hyphen joins
        ("«café»", ["café"], 0, 0),  # only ASCII punctuation is removed
        ("the", ["an"], 1, 0),  # nothing is left of either
        ("", ["Denver"], 0, 0),
    ],
)
def test_one_answer(prediction, golds, exact_match, f1):
    assert squad_metrics({"0": prediction}, dataset(golds)) == {
        "exact_match": 100.0 * exact_match,
        "f1": pytest.approx(100 * f1, rel=1e-14),
    }


def test_a_question_without_prediction_counts_as_wrong():
    assert squad_metrics({"1": "b"}, dataset(["a"], ["b"], ["c"], ["d"])) == {"exact_match": 25.0, "f1": 25.0}
    assert squad_metrics({}, dataset(["a"])) == {"exact_match": 0.0, "f1": 0.0}


@given(st.lists(st.tuples(st.text("ab c.", max_size=6), st.text("ab c.", max_size=6)), min_size=1, max_size=5))
def test_metrics_are_means_over_questions_between_0_and_100(pairs):
    data = dataset(*([gold] for _, gold in pairs))
    whole = squad_metrics({str(index): text for index, (text, _) in enumerate(pairs)}, data)
    alone = [squad_metrics({"0": text}, dataset([gold])) for text, gold in pairs]
    for name in ("exact_match", "f1"):
        assert whole[name] == pytest.approx(sum(one[name] for one in alone) / len(pairs))
        assert 0 <= whole[name] <= 100


@pytest.mark.parametrize(
    ("predictions", "data", "error", "text"),
    [
        (["a"], dataset(["a"]), TypeError, "predictions: expected a dict .* got list"),
        ({"0": None}, dataset(["a"]), TypeError, r"predictions\['0'\]: expected a str, got NoneType"),
        ({"0": "a", "7": "b", "8": ""}, dataset(["a"]), ValueError, "1 questions, got 2 others, e.g. '7'"),
        ({}, {"data": []}, ValueError, "dataset: expected questions, got none"),
        ({}, [], ValueError, "dataset: expected SQuAD's format, a dict with 'data' .list., got list"),
        ({}, {"train": []}, ValueError, r"dataset: .*got only \['train'\]"),
        ({}, {"data": {}}, ValueError, "dataset: .*got dict for it"),
        ({}, {"data": [{"paragraphs": [7]}]}, ValueError, r"data\[0\].paragraphs\[0\]: .*'context'.* got int"),
        ({}, dataset([]), ValueError, r"data\[0\].paragraphs\[0\].qas\[0\].answers: .*v1.1.* got none"),
        ({}, dataset(["a"], ["b"], [7]), ValueError, r"paragraphs\[1\].qas\[0\].answers\[0\]: .*'text'.* got int"),
    ],
)
def test_metric_errors(predictions, data, error, text):
    with pytest.raises(error, match=text):
        squad_metrics(predictions, data)


# --------------------------------------------------------------------------------------------------------- files


def test_plain_and_gzipped_files_by_content_not_by_name(tmp_path):
    data = dataset(["a"], ["b"], ["ü"])
    raw = json.dumps(data, ensure_ascii=False).encode()
    for name, content in (("plain.json", raw), ("zip.json.gz", gzip.compress(raw)), ("zip.json", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        assert load_squad(tmp_path / name) == data
        assert load_squad(str(tmp_path / name)) == data


def test_examples_come_in_the_order_of_the_file():
    assert list(squad_examples(dataset(["a"], ["b"], ["c"]))) == [
        ("0", "what is 0?", "context 0"),
        ("1", "what is 1?", "context 0"),
        ("2", "what is 2?", "context 2"),
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "file: expected JSON"),
        (b"\xff\xfe{}", "file: expected JSON"),
        (gzip.compress(b"{}" * 5000)[:-12], "file: not readable as gzip .*Fetch it again"),
        (gzip.compress(b"{}")[:5] + b"xxxxxxxxxxxxxxxx", "file: not readable as gzip"),
        (b"[]", "file: dataset: expected SQuAD's format"),
        (b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1"}]}]}]}', r"qas\[0\]: .*'question'"),
        (b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1, "question": "q"}]}]}]}', "'id' .str., got int"),
    ],
)
def test_file_errors(tmp_path, content, text):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        load_squad(tmp_path / "file")


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a SQuAD file .* found none"):
            load_squad(path)
