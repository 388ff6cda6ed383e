"""SQuAD-format data and the metric of SQuAD v1.1: exact match and F1."""

import gzip
import json
import os
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def load_squad(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file in SQuAD's format, plain JSON or gzipped, and check its structure.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, damaged, or of another structure; the text names the place.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a SQuAD file (JSON or gzipped JSON), found none")
    raw = Path(path).read_bytes()
    try:
        dataset: dict[str, Any] = json.loads(gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as gzip ({error}); truncated? Fetch it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    try:
        for _ in squad_examples(dataset):
            pass
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dataset


def squad_examples(dataset: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(id, question, context) of every question, in the file's order.

    Raises:
        ValueError: not SQuAD's structure; the text names the place.
    """
    for place, context, entry in _entries(dataset):
        yield _field(entry, "id", str, place), _field(entry, "question", str, place), context


def first_answers(dataset: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    """(question, context, start, end) of every question's first gold answer, in characters: context[start:end].

    Raises:
        ValueError: not SQuAD's structure, a question without an answer, or one that isn't where it is said to be.
    """
    for place, context, entry in _entries(dataset):
        answers = _field(entry, "answers", list, place)
        if not answers:
            raise ValueError(f"{place}.answers: expected a gold answer, got none")
        text = _field(answers[0], "text", str, f"{place}.answers[0]")
        start = _field(answers[0], "answer_start", int, f"{place}.answers[0]")
        if not text or context[start : start + len(text)] != text:
            found = context[start : start + len(text)]
            raise ValueError(f"{place}.answers[0]: expected {text!r} at {start} of the context, got {found!r}")
        yield _field(entry, "question", str, place), context, start, start + len(text)


def first_questions(dataset: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """A dataset with the first `limit` questions only (None: all), in the same format."""
    left = sum(1 for _ in squad_examples(dataset)) if limit is None else limit
    articles = []
    for article in dataset["data"]:
        paragraphs = []
        for paragraph in article["paragraphs"]:
            qas = paragraph["qas"][:left]
            left -= len(qas)
            paragraphs.append({**paragraph, "qas": qas})
        articles.append({**article, "paragraphs": paragraphs})
    return {**dataset, "data": articles}


def is_exact(answer: str, golds: Iterable[str]) -> bool:
    """Whether an answer is one of the gold answers, as the official exact match compares them."""
    return any(_words(answer) == _words(gold) for gold in golds)


def squad_metrics(predictions: Mapping[str, str], dataset: Mapping[str, Any]) -> dict[str, float]:
    """The official SQuAD v1.1 evaluation (Rajpurkar et al. 2016), to the last digit.

    Texts are compared without case, punctuation, articles and extra white space; each answer counts as the closest
    of its gold answers. As in the official script, a question without a prediction counts as 0, and an answer of
    nothing but articles and punctuation has F1 0 even where EM is 1.

    Args:
        predictions: question id -> answer.
        dataset: from `load_squad`: {"data": [{"paragraphs": [{"context", "qas": [{"id", "answers"}]}]}]}.

    Returns: {"exact_match", "f1"}, in percent of all the dataset's questions.

    Raises:
        TypeError: predictions of the wrong type.
        ValueError: a prediction for an id that the dataset does not have (the official script ignores it; it is
            mostly the wrong file); a dataset without questions, with a question without gold answers (that is
            SQuAD v2), or of another structure.
    """
    if not isinstance(predictions, Mapping):
        raise TypeError(f"predictions: expected a dict of question id -> answer, got {type(predictions).__name__}")
    known: set[str] = set()
    total = exact = 0
    f1 = 0.0
    for place, _, entry in _entries(dataset):
        key = _field(entry, "id", str, place)
        known.add(key)
        total += 1
        golds = [
            _field(gold, "text", str, f"{place}.answers[{index}]")
            for index, gold in enumerate(_field(entry, "answers", list, place))
        ]
        if not golds:
            raise ValueError(f"{place}.answers: expected a gold answer (this is the SQuAD v1.1 metric), got none")
        if key not in predictions:
            continue
        if not isinstance(predictions[key], str):
            raise TypeError(f"predictions[{key!r}]: expected a str, got {type(predictions[key]).__name__}")
        predicted = _words(predictions[key])
        exact += max(predicted == _words(gold) for gold in golds)
        f1 += max(_f1(predicted, _words(gold)) for gold in golds)
    if unknown := sorted(map(str, predictions.keys() - known)):
        raise ValueError(
            f"predictions: expected ids of the dataset's {total} questions, got {len(unknown)} others, e.g. "
            f"{unknown[0]!r}; leave them out, or give the dataset that they belong to"
        )
    if not total:
        raise ValueError("dataset: expected questions, got none")
    return {"exact_match": 100.0 * exact / total, "f1": 100.0 * f1 / total}


def _words(text: str) -> list[str]:
    """What the metric compares: lower-case words without punctuation and articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(predicted: list[str], gold: list[str]) -> float:
    same = (Counter(predicted) & Counter(gold)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return (2 * precision * recall) / (precision + recall)  # in this order: the last digit depends on it


def _entries(dataset: Any) -> Iterator[tuple[str, str, Any]]:
    """(where it is, context, entry) of every question."""
    for a, article in enumerate(_field(dataset, "data", list, "dataset")):
        for p, paragraph in enumerate(_field(article, "paragraphs", list, f"data[{a}]")):
            place = f"data[{a}].paragraphs[{p}]"
            context = _field(paragraph, "context", str, place)
            for q, entry in enumerate(_field(paragraph, "qas", list, place)):
                yield f"{place}.qas[{q}]", context, entry


def _field(parent: Any, name: str, kind: type, place: str) -> Any:
    if not isinstance(parent, Mapping) or not isinstance(parent.get(name), kind):
        got = type(parent).__name__
        if isinstance(parent, Mapping):
            got = f"{type(parent[name]).__name__} for it" if name in parent else f"only {sorted(map(str, parent))[:8]}"
        raise ValueError(f"{place}: expected SQuAD's format, a dict with {name!r} ({kind.__name__}), got {got}")
    return parent[name]
