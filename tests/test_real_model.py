"""A real BERT on real questions: patching must not change an answer."""

import pytest
import torch
import transformers

import packedbert
from packedbert.squad import load_squad, squad_examples

QUESTIONS = 1000


@pytest.fixture(scope="module")
def answers(shared):
    """(ids, answers of the stock model, answers of the patched model, the part of SQuAD that was asked)."""
    data = load_squad(shared / "data" / "squad-dev-v1.1-a.json.gz")
    examples = list(squad_examples(data))[:QUESTIONS]
    ids = [example[0] for example in examples]
    questions, contexts = [example[1] for example in examples], [example[2] for example in examples]
    folder = shared / "models" / "minilm-qa"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)
    stock = packedbert.QuestionAnswerer(model, tokenizer)(question=questions, context=contexts)
    packedbert.patch_model(model)
    patched = packedbert.QuestionAnswerer(model, tokenizer)(question=questions, context=contexts)
    asked = set(ids)
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [qa for qa in paragraph["qas"] if qa["id"] in asked]
    return ids, stock, patched, data


def test_patched_and_stock_give_the_same_answers(answers, capsys):
    ids, stock, patched, data = answers
    assert len(ids) == QUESTIONS
    different = [
        (one, other)
        for one, other in zip(stock, patched, strict=True)
        if (one["start"], one["end"]) != (other["start"], other["end"])
    ]
    metrics = [
        packedbert.squad_metrics({id: answer["answer"] for id, answer in zip(ids, given, strict=True)}, data)
        for given in (stock, patched)
    ]
    with capsys.disabled():
        print(
            f"\nminilm-qa on {QUESTIONS} questions, stock and patched: {metrics}; different answers: {len(different)}"
        )
    assert not different
    assert metrics[0] == metrics[1]
    scores = torch.tensor([[answer["score"] for answer in given] for given in (stock, patched)])
    assert (scores[0] - scores[1]).abs().max() < 1e-4
    assert metrics[0]["f1"] > 70  # the model card's figure on all of this part is 74.2
