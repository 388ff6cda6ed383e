"""recover_model: it learns, what is gone stays gone, it resumes to the same bits; and labelled examples."""

import copy
from dataclasses import replace

import pytest
import torch
from models import tiny_bert, tiny_config
from test_prune import config, data, flops, model  # noqa: F401  (fixtures)
from test_qa import make_tokenizer

import packedbert
from packedbert import examples, recover
from packedbert.recover import Recipe, distillation_loss, recover_model

RECIPE = Recipe(epochs=4, batch_size=8, learning_rate=2e-3)


@pytest.fixture(scope="module")
def pruned(model, data, flops):  # noqa: F811
    return packedbert.prune_model(model, data, 2.0, cost_model=flops)


def distance(student, teacher, batch):
    with torch.no_grad():
        return distillation_loss(student(**batch), teacher(**batch), batch["attention_mask"], 1.0).item()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_brings_it_nearer_to_the_teacher(model, pruned, data, bfloat16):  # noqa: F811
    student, told = copy.deepcopy(pruned), []
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # with so few weights its noise outweighs what is learned
    recipe = replace(RECIPE, alpha=1.0, epochs=8, learning_rate=1e-3, bfloat16=bfloat16)
    assert recover_model(student, model, data, recipe, progress=lambda *step: told.append(step)) is student
    assert not student.training
    assert [step[0] for step in told] == list(range(1, 65))
    assert all(step[1] == 64 for step in told)
    batch = examples.collate(data)
    assert distance(student, model, batch) < 0.7 * distance(pruned, model, batch)


def test_what_is_gone_stays_gone_and_the_rest_is_trained(model, pruned, data):  # noqa: F811
    student = recover_model(copy.deepcopy(pruned), model, data, RECIPE)
    for (name, before), after in zip(pruned.named_parameters(), student.parameters(), strict=True):
        if name.endswith("weight") and "layer." in name and before.dim() == 2:
            assert torch.equal(before == 0, after == 0), name
        if "position_embeddings" not in name and "key.bias" not in name:
            assert not torch.equal(before, after), name


def test_an_interrupted_training_goes_on_to_the_same_bits(model, pruned, data, tmp_path):  # noqa: F811
    whole = recover_model(copy.deepcopy(pruned), model, data, RECIPE)
    student = copy.deepcopy(pruned)

    def interrupt(step, total, loss):
        if step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_model(student, model, data, RECIPE, folder=tmp_path / "state", progress=interrupt)
    for before, after in zip(pruned.parameters(), student.parameters(), strict=True):
        assert torch.equal(before, after)  # nothing is half trained
    told = []
    recover_model(student, model, data, RECIPE, folder=tmp_path / "state", progress=lambda *step: told.append(step[0]))
    assert told[0] == 14
    for expected, parameter in zip(whole.parameters(), student.parameters(), strict=True):
        assert torch.equal(expected, parameter)
    # What is done is done: a third time gives the result at once.
    again, told = copy.deepcopy(pruned), []
    recover_model(again, model, data, RECIPE, folder=tmp_path / "state", progress=lambda *step: told.append(step))
    assert not told
    assert torch.equal(again.qa_outputs.weight, whole.qa_outputs.weight)


def test_a_state_of_something_else_is_refused(model, pruned, data, tmp_path, flops):  # noqa: F811
    short = replace(RECIPE, epochs=0.2)
    recover_model(copy.deepcopy(pruned), model, data, short, folder=tmp_path)
    with pytest.raises(ValueError, match=r"expected a state of recipe .* delete it, or name another folder"):
        recover_model(copy.deepcopy(pruned), model, data, RECIPE, folder=tmp_path)
    with pytest.raises(ValueError, match="expected a state of examples 60, got one of 64"):
        recover_model(copy.deepcopy(pruned), model, data[:60], short, folder=tmp_path)
    other = packedbert.prune_model(model, data, 1.4, cost_model=flops)
    with pytest.raises(ValueError, match="expected a state of this pruned model, got another's"):
        recover_model(other, model, data, short, folder=tmp_path)


def test_a_budget_of_time_ends_it_with_the_learning_rate_down(model, pruned, data, monkeypatch):  # noqa: F811
    clock = iter(range(10**6))
    monkeypatch.setattr(recover.time, "perf_counter", lambda: float(next(clock)))  # every look takes a second
    told = []
    recover_model(
        copy.deepcopy(pruned), model, data, replace(RECIPE, epochs=100), minutes=1.0,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert told[0][1] == 800
    assert told[-1][0] == told[-1][1]
    assert 55 <= told[-1][0] <= 61


def test_refused_before_anything_is_trained(model, pruned, data, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        recover_model(copy.deepcopy(pruned), model, data, RECIPE, folder=tmp_path / "file")
    with pytest.raises(ValueError, match="data: expected labelled examples, got none"):
        recover_model(copy.deepcopy(pruned), model, [], RECIPE)
    with pytest.raises(ValueError, match="got one that is packed already"):
        recover_model(packedbert.patch_model(copy.deepcopy(pruned)), model, data, RECIPE)
    broken = copy.deepcopy(pruned)
    with torch.no_grad():
        broken.qa_outputs.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="step 0: expected a finite loss"):
        recover_model(broken, model, data, RECIPE)


def test_distillation_loss_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    student = {name: torch.randn(2, 4) for name in ("start_logits", "end_logits")}
    teacher = {name: torch.randn(2, 4) for name in student}
    expected = 0.0
    for name in student:
        for row, length in ((0, 3), (1, 2)):
            p = (teacher[name][row, :length] / 2).softmax(0)
            q = (student[name][row, :length] / 2).softmax(0)
            expected += 4 * (p * (p / q).log()).sum() / 4  # temperature^2; two rows of two outputs
    assert torch.allclose(distillation_loss(student, teacher, mask, 2.0), expected)
    assert distillation_loss(teacher, teacher, mask, 2.0).abs() < 1e-6
    tokens = {"logits": torch.randn(2, 4, 5)}
    other = {"logits": tokens["logits"] + (mask == 0)[:, :, None] * torch.randn(2, 4, 5)}
    assert distillation_loss(tokens, other, mask, 1.0).abs() < 1e-6  # padding has no part in it
    with pytest.raises(ValueError, match="expected outputs with logits"):
        distillation_loss({"hidden": torch.ones(1)}, {}, None, 1.0)


# ------------------------------------------------------------------------------------------------- examples


def squad_of(*answers, context="the cat sat on a mat"):
    qas = [
        {"id": str(i), "question": "who?", "answers": [{"text": text, "answer_start": context.index(text)}]}
        for i, text in enumerate(answers)
    ]
    return {"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}


def test_squad_examples_point_at_their_answers():
    tokenizer = make_tokenizer()
    found = packedbert.squad_training_examples(squad_of("cat", "a mat", "the"), tokenizer, max_length=64, doc_stride=4)
    texts = [
        tokenizer.decode(example["input_ids"][example["start_positions"] : example["end_positions"] + 1])
        .replace(" ##", "")
        .replace(" ", "")
        for example in found
    ]
    assert texts == ["cat", "amat", "the"]
    assert all(example["token_type_ids"][example["start_positions"]] == 1 for example in found)


def test_windows_without_the_answer_are_left_out():
    tokenizer = make_tokenizer()
    dataset = squad_of("mat", context="the cat sat on a hat " * 3 + "and then on a mat")
    found = packedbert.squad_training_examples(dataset, tokenizer, max_length=24, doc_stride=6)
    assert 1 <= len(found) <= 3
    for example in found:
        assert len(example["input_ids"]) <= 24
        assert example["end_positions"] - example["start_positions"] == 2
    with pytest.raises(ValueError, match="expected questions whose answer fits a window of 12 tokens, got none"):
        packedbert.squad_training_examples(squad_of("cat sat on a"), tokenizer, max_length=12, doc_stride=1)


def test_an_answer_that_is_not_where_it_is_said_to_be():
    dataset = squad_of("cat")
    dataset["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 2
    with pytest.raises(ValueError, match=r"answers\[0\]: expected 'cat' at 2 of the context, got 'e c'"):
        packedbert.squad_training_examples(dataset, make_tokenizer())


def test_batches_are_padded_and_of_about_one_length():
    items = [{"input_ids": [7] * n, "labels": [1] * n, "start_positions": n} for n in (2, 5, 3)]
    first, second = examples.batches(items, 2, pad_token_id=9)
    assert first["input_ids"].tolist() == [[7] * 5, [7, 7, 7, 9, 9]]
    assert first["labels"].tolist() == [[1] * 5, [1, 1, 1, -100, -100]]
    assert first["start_positions"].tolist() == [5, 3]
    assert second["input_ids"].tolist() == [[7, 7]]
    for most, length in ((None, 8), (6, 6), (3, 5)):
        assert examples.collate(items, 9, 8, most)["input_ids"].shape == (3, length)
    with pytest.raises(TypeError, match=r"data\[0\]: expected a mapping"):
        list(examples.batches(["text"], 2))


def test_the_dense_model_can_be_trained_too(model, data):  # noqa: F811
    """The control of an experiment: the same recipe, nothing pruned."""
    student = recover_model(copy.deepcopy(model), model, data, replace(RECIPE, epochs=1, alpha=0.0))
    before = model(**examples.collate(data)).loss.item()
    assert student(**examples.collate(data)).loss.item() < before


def test_a_layer_without_heads_keeps_one_to_be_trained(data):  # noqa: F811
    model = tiny_bert("BertForQuestionAnswering", tiny_config())  # noqa: F811
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight.zero_()
    recover_model(model, copy.deepcopy(model), data, replace(RECIPE, epochs=0.3))
