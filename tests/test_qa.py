"""QuestionAnswerer: against a plain search written here, and stub models whose answers are known."""

import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_bert, tiny_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, QuestionAnsweringModelOutput

import packedbert
from packedbert.qa import QuestionAnswerer, best_spans

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *LETTERS, *(f"##{x}" for x in LETTERS), "?", "."])}


def make_tokenizer(cls="[CLS] ", **options):
    """WordPiece whose pieces are single letters: a word has as many tokens as letters."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}$A [SEP]",
        pair=f"{cls}$A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, VOCABULARY[word]) for word in ("[CLS]", "[SEP]")],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": cls.strip() or None, "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **names, **options
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bert():
    return tiny_bert(
        "BertForQuestionAnswering", tiny_config(vocab_size=len(VOCABULARY), max_position_embeddings=128), seed=3
    )


class Lookup(nn.Module):
    """Logits that depend on the token only: `words` gives (start, end) of some, all others have 0.

    Padding and whatever the caller puts into `loud` get enormous logits, which must never matter.
    """

    def __init__(self, words=(), loud=()):
        super().__init__()
        table = torch.zeros(len(VOCABULARY), 2)
        for word, logits in dict(words).items():
            table[VOCABULARY[word]] = torch.tensor(logits, dtype=torch.float)
        for word in ("[PAD]", *loud):
            table[VOCABULARY[word]] = 1e30
        self.table = nn.Parameter(table)
        self.seen = []
        self.eval()

    def forward(self, input_ids, attention_mask, token_type_ids):
        assert torch.is_inference_mode_enabled()
        assert torch.equal(attention_mask, (input_ids != 0).long())
        self.seen.append(input_ids)
        start, end = self.table[input_ids].unbind(-1)
        return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


def words(count, seed=0, longest=4):
    """A text of so many words."""
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list(LETTERS), rng.integers(1, longest + 1))) for _ in range(count))


# ---------------------------------------------------------------------------------------------------- the search

probabilities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5]))  # the latter make ties


@given(
    st.lists(st.tuples(probabilities, probabilities), max_size=12),
    st.integers(1, 90),
    st.integers(1, 14),
)
def test_best_spans_against_every_span(pairs, count, max_length):
    start, end = ([pair[side] for pair in pairs] for side in (0, 1))
    every = [
        (start[i] * end[j], i, j)
        for i in range(len(pairs))
        for j in range(len(pairs))
        if i <= j and j - i + 1 <= max_length
    ]
    every.sort(key=lambda span: (-span[0], span[1], span[2]))
    firsts, lasts, scores = best_spans(np.array(start), np.array(end), count, max_length)
    assert list(zip(scores, firsts, lasts, strict=True)) == every[:count]


@torch.no_grad()
def slow_answers(
    model, question, context, *, top_k, max_seq_len, doc_stride, max_answer_len, align_to_words, impossible
):
    """The same method in plain loops: own windows, own tokens (a letter each), own words, one window at a time."""
    ids = [VOCABULARY["[CLS]"], *letters(question)[0], VOCABULARY["[SEP]"]]
    pieces, places, spans = letters(context)
    room = max_seq_len - len(ids) - 1
    begins = [0]
    while begins[-1] + room < len(pieces):
        begins.append(begins[-1] + room - doc_stride)
    answers, null = [], math.inf
    for begin in begins:
        part = pieces[begin : begin + room]
        row = [*ids, *part, VOCABULARY["[SEP]"]]
        types = [0] * len(ids) + [1] * (len(part) + 1)
        output = model(
            input_ids=torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            token_type_ids=torch.tensor([types]),
        )
        chances = []
        for logits in (output.start_logits[0].tolist(), output.end_logits[0].tolist()):
            powers = [math.exp(logits[0])] + [math.exp(x) for x in logits[len(ids) : len(ids) + len(part)]]
            chances.append([power / math.fsum(powers) for power in powers])
        null = min(null, chances[0][0] * chances[1][0])
        candidates = []
        for i in range(len(part)):
            for j in range(i, min(i + max_answer_len, len(part))):
                candidates.append((chances[0][i + 1] * chances[1][j + 1], begin + i, begin + j))
        candidates.sort(key=lambda candidate: -candidate[0])
        for score, i, j in candidates[: 2 * top_k + 10 if align_to_words else top_k]:
            first, last = places[i], places[j]
            if align_to_words:  # to the ends of the word, as far as the window shows it
                first = max(spans[i][0], places[begin])
                last = min(spans[j][1], places[begin + len(part) - 1])
            text = context[first : last + 1]
            for answer in answers:
                if answer["answer"].lower() == text.lower():
                    answer["score"] += score
                    break
            else:
                answers.append({"score": score, "start": first, "end": last + 1, "answer": text})
    if impossible:
        answers.append({"score": null, "start": 0, "end": 0, "answer": ""})
    return sorted(answers, key=lambda answer: -answer["score"])[:top_k]


def letters(text):
    """Token ids, the place of each in the text, and the places of the first and last letter of its word."""
    ids, places, spans = [], [], []
    place = 0
    for word in text.split(" "):
        for index, letter in enumerate(word.lower()):
            ids.append(VOCABULARY["##" + letter if index else letter])
            places.append(place + index)
            spans.append((place, place + len(word) - 1))
        place += len(word) + 1
    return ids, places, spans


def same(got, expected):
    assert [(a["start"], a["end"], a["answer"]) for a in got] == [(a["start"], a["end"], a["answer"]) for a in expected]
    assert [a["score"] for a in got] == pytest.approx([a["score"] for a in expected], rel=1e-4)


@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("align_to_words", [False, True])
@pytest.mark.parametrize("max_answer_len", [1, 5, 200])
@pytest.mark.parametrize(("count", "windows"), [(1, 1), (12, 1), (60, 4)])
def test_answers_against_the_slow_search(bert, tokenizer, count, windows, max_answer_len, align_to_words, impossible):
    options = {"max_seq_len": 64, "doc_stride": 9, "max_answer_len": max_answer_len, "align_to_words": align_to_words}
    question, context = words(3, seed=1), words(count, seed=count).title()
    calls = []
    got = QuestionAnswerer(bert, tokenizer)(
        question,
        context,
        top_k=4,
        handle_impossible_answer=impossible,
        progress=lambda *done: calls.append(done),
        **options,
    )
    same(got, slow_answers(bert, question, context, top_k=4, impossible=impossible, **options))
    assert calls == [(windows, windows)]


# ------------------------------------------------------------------------------------------------------- windows


def test_windows_find_what_one_large_window_finds(tokenizer):
    """The answer is wherever z..y is, and its score adds up over the windows that show all of it."""
    model = Lookup({"z": (20, 0), "y": (0, 20)})
    answerer = QuestionAnswerer(model, tokenizer)
    fill = list("abcde" * 16)
    for place in range(0, 80, 3):
        context = " ".join([*fill[:place], "z", "x", "y", *fill[place:]])
        whole = answerer("who?", context, max_seq_len=200)
        assert whole["answer"] == "z x y"
        assert whole["start"] == 2 * place
        assert whole["score"] == pytest.approx(1, abs=1e-6)
        model.seen.clear()
        cut = answerer("who?", context, max_seq_len=27, doc_stride=8)  # 20 tokens of context, the next starts 12 later
        assert {key: cut[key] for key in ("start", "end", "answer")} == {
            key: whole[key] for key in ("start", "end", "answer")
        }
        begins = range(0, 83 - 8, 12)
        complete = sum(begin <= place and place + 3 <= begin + 20 for begin in begins)
        assert sum(len(batch) for batch in model.seen) == len(begins)
        assert complete in (1, 2)
        assert cut["score"] == pytest.approx(complete, abs=1e-5)


def test_a_batch_is_of_similar_lengths_the_longest_first_and_padded_to_its_longest(tokenizer):
    model = Lookup()
    calls = []
    contexts = [" ".join("a" * count) for count in (3, 40, 1, 39, 2, 20)]
    QuestionAnswerer(model, tokenizer)(
        ["b"] * 6, contexts, batch_size=2, progress=lambda done, total: calls.append((done, total))
    )
    assert [list(batch.shape) for batch in model.seen] == [[2, 44], [2, 24], [2, 6]]
    assert calls == [(2, 6), (4, 6), (6, 6)]


def test_neither_order_nor_batch_size_changes_an_answer(bert, tokenizer):
    questions = [words(1 + seed % 4, seed=seed) for seed in range(12)]
    contexts = [words(1 + seed * 7 % 26, seed=100 + seed) for seed in range(12)]
    answerer = QuestionAnswerer(bert, tokenizer)
    options = {"max_seq_len": 40, "doc_stride": 10, "top_k": 3}
    alone = [answerer(*pair, **options) for pair in zip(questions, contexts, strict=True)]
    for batch_size in (1, 5, 1000):
        for got, expected in zip(answerer(questions, contexts, batch_size=batch_size, **options), alone, strict=True):
            same(got, expected)
    order = np.random.default_rng(0).permutation(12)
    shuffled = answerer([questions[index] for index in order], [contexts[index] for index in order], **options)
    for got, index in zip(shuffled, order, strict=True):
        same(got, alone[index])


def test_more_questions_than_are_tokenized_at_once(tokenizer):
    model = Lookup({"z": (20, 20)})
    contexts = [" ".join(["a"] * (index % 13) + ["z"]) for index in range(600)]
    answers = QuestionAnswerer(model, tokenizer)(["b"] * 600, contexts, batch_size=128)
    assert [answer["start"] for answer in answers] == [2 * (index % 13) for index in range(600)]


# -------------------------------------------------------------------------------------------------------- scores


def test_scores_are_a_softmax_over_context_and_cls(tokenizer):
    """Question and padding take no part, however loud they are."""
    model = Lookup({"[CLS]": (1, 2), "a": (3, 0.5), "b": (-1, 1)}, loud=["q", "[SEP]"])
    start = np.exp([1, 3, -1]) / np.exp([1, 3, -1]).sum()
    end = np.exp([2, 0.5, 1]) / np.exp([2, 0.5, 1]).sum()
    answerer = QuestionAnswerer(model, tokenizer)
    got, _ = answerer(["q q", "q"], ["a b", "z " * 30], top_k=9, handle_impossible_answer=True)
    expected = {"a b": start[1] * end[2], "a": start[1] * end[1], "b": start[2] * end[2], "": start[0] * end[0]}
    assert {answer["answer"]: answer["score"] for answer in got} == pytest.approx(expected, rel=1e-5)
    assert [answer["answer"] for answer in got] == sorted(expected, key=expected.get, reverse=True)


def test_no_answer_has_the_lowest_score_of_the_windows(tokenizer):
    """In the window with z almost nothing is left for CLS."""
    answerer = QuestionAnswerer(Lookup({"z": (9, 9), "[CLS]": (12, 12)}), tokenizer)
    context = "a " * 40
    options = {"max_seq_len": 20, "doc_stride": 4, "handle_impossible_answer": True}
    null = answerer("q", context + "z", top_k=50, **options)[-50:]
    (null,) = [answer for answer in null if answer["answer"] == ""]
    chance = math.exp(12) / (math.exp(12) + math.exp(9) + 8)
    assert null["score"] == pytest.approx(chance**2, rel=1e-3)
    assert null["score"] < answerer("q", context, **options)["score"]


def test_without_a_cls_token_there_is_no_chance_of_no_answer():
    answerer = QuestionAnswerer(Lookup(loud=["q"]), make_tokenizer(cls=""))
    answers = answerer("q", "a b", top_k=9, handle_impossible_answer=True)
    assert {answer["answer"]: answer["score"] for answer in answers} == {"a": 0.25, "a b": 0.25, "b": 0.25, "": 0.0}


def test_equal_texts_are_one_answer_whatever_their_case(tokenizer):
    answerer = QuestionAnswerer(Lookup({"z": (5, 5)}), tokenizer)
    (best, *_) = answerer("q", "a Z b z", top_k=10, max_answer_len=1)
    assert (best["answer"], best["start"]) == ("Z", 2)
    assert best["score"] == pytest.approx(2 * (math.exp(5) / (2 * math.exp(5) + 3)) ** 2, rel=1e-5)


def test_alignment_to_words(tokenizer):
    answerer = QuestionAnswerer(Lookup({"##z": (9, 0), "##y": (0, 9)}), tokenizer)
    assert answerer("q", "Abz cyd e")["answer"] == "Abz cyd"
    assert answerer("q", "Abz cyd e", align_to_words=False)["answer"] == "z cy"


def test_logits_outside_of_the_window_may_be_nan_but_not_within(tokenizer):
    model = Lookup({"[SEP]": (math.nan, math.nan), "z": (5, 5)})
    answerer = QuestionAnswerer(model, tokenizer)
    assert answerer("q", "a z")["answer"] == "z"
    model.table.data[VOCABULARY["a"]] = math.inf
    with pytest.raises(ValueError, match="model: expected finite logits"):
        answerer("q", "a z")


# -------------------------------------------------------------------------------------------------------- shapes


def test_shapes_of_the_result(tokenizer):
    answerer = QuestionAnswerer(Lookup({"z": (9, 9)}), tokenizer)
    one = answerer(question="q", context="a z")
    assert set(one) == {"score", "start", "end", "answer"}
    assert [type(one[key]) for key in ("score", "start", "end", "answer")] == [float, int, int, str]
    several = answerer(question="q", context="a z", top_k=2)
    assert several[0] == one
    assert len(several) == 2
    assert answerer(question=["q"], context=["a z"]) == [one]
    assert answerer(question=["q", "q"], context="a z") == [one, one]
    assert answerer(question=("q", "q"), context=("a z", "a z"), top_k=2) == [several, several]
    assert answerer(question=[], context=[]) == answerer(question=[], context="a") == []
    # A short context has fewer answers, and nothing made up fills the list.
    assert [answer["answer"] for answer in answerer("q", "z", top_k=5)] == ["z"]


def test_where_nothing_can_be_answered(tokenizer):
    answerer = QuestionAnswerer(Lookup(), tokenizer)
    nothing = {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    assert answerer("q", " \n") == nothing
    assert answerer("q", " \n", top_k=3) == [nothing]
    assert answerer("q", " ", handle_impossible_answer=True) == {**nothing, "score": 1.0}


def test_a_long_question_is_cut(tokenizer):
    model = Lookup({"z": (9, 9)})
    question = "abc def ghij"
    assert QuestionAnswerer(model, tokenizer)(question, "k z", max_question_len=5)["answer"] == "z"
    assert tokenizer.decode(model.seen[0][0]) == "[CLS] a ##b ##c d ##e [SEP] k z [SEP]"
    QuestionAnswerer(model, tokenizer)(question, "k z", max_question_len=10)
    assert tokenizer.decode(model.seen[1][0]) == "[CLS] a ##b ##c d ##e ##f g ##h ##i ##j [SEP] k z [SEP]"


def test_a_tokenizer_that_pads_on_the_left_has_the_context_first():
    model = Lookup({"z": (9, 9)}, loud=["q"])
    tokenizer = make_tokenizer(padding_side="left")
    answers = QuestionAnswerer(model, tokenizer)(["q r"] * 2, ["a z", "z a a"])
    assert [(answer["start"], answer["answer"]) for answer in answers] == [(2, "z"), (0, "z")]
    assert tokenizer.decode(model.seen[0][0]) == "[CLS] z a a [SEP] q r [SEP]"


def test_defaults_follow_tokenizer_and_model(bert):
    """The model has 128 positions, this tokenizer 50; the stride shrinks with them."""
    answerer = QuestionAnswerer(bert, make_tokenizer())
    assert answerer._lengths(None, None) == (128, 64)
    assert QuestionAnswerer(bert, make_tokenizer(model_max_length=50))._lengths(None, None) == (50, 25)
    assert QuestionAnswerer(Lookup(), make_tokenizer())._lengths(None, None) == (384, 128)
    assert answerer("what", words(200))["answer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_model_gives_the_same_answers(tokenizer, dtype):
    config = tiny_config(vocab_size=len(VOCABULARY), max_position_embeddings=128)
    model = tiny_bert("BertForQuestionAnswering", config, seed=3).to(dtype)
    questions, contexts = [words(2, seed) for seed in range(9)], [words(5 + 9 * seed, seed) for seed in range(9)]
    answerer = QuestionAnswerer(model, tokenizer)
    stock = answerer(questions, contexts, batch_size=4)
    packedbert.patch_model(model)
    for got, expected in itertools.zip_longest(answerer(questions, contexts, batch_size=4), stock):
        if dtype == torch.float32:
            same([got], [expected])
        else:
            assert got["score"] == pytest.approx(expected["score"], abs=0.05)


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"question": ""}, ValueError, "question: expected a text, got an empty one"),
        ({"context": ""}, ValueError, "context: expected a text, got an empty one"),
        ({"question": ["q", ""]}, ValueError, r"question\[1\]: expected a text"),
        ({"question": None}, TypeError, "question: expected a str or a list of str, got NoneType"),
        ({"context": {"a": "b"}}, TypeError, "context: expected a str or a list of str, got dict"),
        ({"question": ["q", 7]}, TypeError, r"question\[1\]: expected a str, got int"),
        ({"context": ["a", "b"]}, TypeError, r"context: expected a str, .* got a list of 2; .*\[question\]"),
        ({"question": ["q"] * 3, "context": ["a", "b"]}, ValueError, "each of the 3 questions.* got a list of 2"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"top_k": 1.0}, TypeError, "top_k: expected an int, got float"),
        ({"top_k": True}, TypeError, "top_k: expected an int, got bool"),
        ({"max_answer_len": 0}, ValueError, "max_answer_len: expected at least 1, got 0"),
        ({"max_question_len": 0}, ValueError, "max_question_len: expected at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"doc_stride": -1}, ValueError, "doc_stride: expected at least 0, got -1"),
        ({"max_seq_len": 129}, ValueError, "max_seq_len: expected at most the model's 128 positions, got 129"),
        ({"max_seq_len": 20, "doc_stride": 17}, ValueError, r"max_seq_len without special tokens \(17\), got 17"),
        (
            {"context": "a " * 50, "question": "what", "max_seq_len": 20, "doc_stride": 13},
            ValueError,
            "doc_stride: expected less than the 13 tokens .* 3 special tokens and the question's 4, got 13",
        ),
        ({"question": "abc " * 9, "max_seq_len": 30}, ValueError, "less than the 0 tokens .* question's 27"),
    ],
)
def test_argument_errors(bert, tokenizer, arguments, error, text):
    with pytest.raises(error, match=text):
        QuestionAnswerer(bert, tokenizer)(**{"question": "q", "context": "a b", **arguments})


def test_a_stride_that_no_window_needs_is_fine(tokenizer):
    """As in transformers 4: a context that fits in one window is not cut."""
    answerer = QuestionAnswerer(Lookup({"z": (9, 9)}), tokenizer)
    assert answerer("what", "z " + "a " * 12, max_seq_len=20, doc_stride=16)["answer"] == "z"


def test_model_and_tokenizer_errors(bert, tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match=r"tokenizer: expected a fast tokenizer .* got Slow; .*AutoTokenizer"):
        QuestionAnswerer(bert, Slow())
    with pytest.raises(TypeError, match=r"model: expected a ...ForQuestionAnswering model, got str"):
        QuestionAnswerer("a name", tokenizer)
    with pytest.raises(TypeError, match=r"expected start_logits and end_logits of .* from BertModel; .*Auto"):
        QuestionAnswerer(bert.bert, tokenizer)("q", "a")
    bert.train()
    try:
        with pytest.raises(ValueError, match=r"training mode .*model.eval\(\)"):
            QuestionAnswerer(bert, tokenizer)("q", "a")
    finally:
        bert.eval()

    class Short(Lookup):
        def forward(self, input_ids, **kwargs):
            return QuestionAnsweringModelOutput(start_logits=torch.zeros(1, 2), end_logits=torch.zeros(1, 2))

    class Other(Lookup):
        def forward(self, input_ids, **kwargs):
            return BaseModelOutput(last_hidden_state=torch.zeros(1, 2, 3))

    with pytest.raises(TypeError, match=r"of shape \[1, 5\], got \[1, 2\] from Short"):
        QuestionAnswerer(Short(), tokenizer)("q", "a")
    with pytest.raises(TypeError, match="got BaseModelOutput without from Other"):
        QuestionAnswerer(Other(), tokenizer)("q", "a")
