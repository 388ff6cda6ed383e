"""Questions in, answers out: transformers 4's removed `question-answering` pipeline.

`QuestionAnswerer` gives the answers, scores and merging of the pipeline in transformers 4.57.6 (tests/test_oracle.py
compares the two), with all windows of all questions batched by length. The method is that of Devlin et al. 2019
(BERT, section 4.2) with the span search of Chen et al. 2017 (DrQA): a span's score is P(start) * P(end).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

#: How many questions go to the tokenizer at once: bounds the memory of its Encoding objects, which are large.
_TOKENIZE_AT_ONCE = 256


class Answer(TypedDict):
    """One answer: `answer == context[start:end]`, in characters; "" at 0, 0 where there is none."""

    score: float
    start: int
    end: int
    answer: str


@dataclass
class _Window:
    """One input of the model: a question and a part of its context. S tokens, n of them the context's."""

    example: int
    inputs: dict[str, list[int]]  # [S] each, unpadded
    context: slice  # of the tokens
    nulls: list[int]  # positions of the CLS token, which stands for "no answer"
    offsets: NDArray[np.int64]  # [n, 2], characters of the context
    words: NDArray[np.int64]  # [n], -1 where the tokenizer knows no word


@dataclass
class _Candidates:
    """The best spans of one window, best first, as characters of the context."""

    spans: list[tuple[float, int, int]]
    null_score: float


class QuestionAnswerer:
    """Extractive question answering with any model that returns `start_logits` and `end_logits`.

    Args:
        model: a transformers ...ForQuestionAnswering in evaluation mode, patched or not; it is run where it is.
        tokenizer: its fast tokenizer (offsets and words are needed).

    Raises:
        TypeError: a tokenizer that is not a fast one; a model that is not a torch module.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a ...ForQuestionAnswering model, got {type(model).__name__}")
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"tokenizer: expected a fast tokenizer (character offsets are needed), got {type(tokenizer).__name__}; "
                "load it with AutoTokenizer.from_pretrained"
            )
        self.model = model
        self.tokenizer = tokenizer

    def __call__(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        *,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_seq_len: int | None = None,
        max_answer_len: int = 15,
        max_question_len: int = 64,
        batch_size: int = 16,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        progress: Callable[[int, int], object] | None = None,
    ) -> Answer | list[Answer] | list[list[Answer]]:
        """Find the answers to one question or many.

        A context that is too long is cut into overlapping windows, each with the whole question. Within a window,
        start and end probabilities are a softmax over the context's tokens and CLS. The best 2 * top_k + 10 spans of
        every window (top_k without `align_to_words`) are widened to whole words; spans with the same text, whatever
        its case, are one answer at the first one's place, and their scores add up, over overlapping windows too (so
        a score may exceed 1).

        Args:
            question: one, or a list.
            context: one, or a list as long as the questions'; one context may serve a list of questions.
            top_k: answers per question, at most: a short context has fewer.
            doc_stride: tokens by which windows overlap; None: 128, or half of max_seq_len where that is less.
            max_seq_len: tokens of a window, question and special tokens included; None: 384, or what the tokenizer
                and the model allow where that is less.
            max_answer_len: tokens of an answer, at most (before it is widened to whole words).
            max_question_len: tokens of a question; a longer one is cut. (transformers 4 said so too, but did so with
                slow tokenizers only.)
            batch_size: windows that the model gets at once. They are sorted by length, longest first, and padded to
                the longest of their batch. It changes answers by rounding only.
            handle_impossible_answer: let "" compete, with the lowest P(CLS, CLS) of all windows as its score.
            align_to_words: widen answers to whole words, as the tokenizer knows them.
            progress: called with (windows done, windows in all) after every batch.

        Returns: in the order of the questions
            one question, top_k 1: an `Answer`, {"score", "start", "end", "answer"};
            one question, top_k > 1: a list of them, best first, at least one;
            a list of questions: a list of the above. (transformers 4 unwrapped lists of one; this does not.)
            Where nothing can be answered (a context of white space), the answer is "" at 0, 0 with score 0.

        Raises:
            TypeError: an argument of the wrong type; a model that returns no start_logits and end_logits.
            ValueError: an empty question or context; lists that differ in length; a number out of its range; a
                question, doc_stride and max_seq_len that leave a context no room; a model in training mode; logits
                that are not finite.
        """
        questions, contexts, single = _examples(question, context)
        for name, value, least in (
            ("top_k", top_k, 1),
            ("max_answer_len", max_answer_len, 1),
            ("max_question_len", max_question_len, 1),
            ("batch_size", batch_size, 1),
        ):
            _check_number(name, value, least)
        max_seq_len, doc_stride = self._lengths(max_seq_len, doc_stride)
        if self.model.training:
            raise ValueError(
                "model: expected evaluation mode, got training mode (dropout is random); call model.eval()"
            )

        questions = self._fit(questions, contexts, max_question_len, max_seq_len, doc_stride)
        windows = self._windows(questions, contexts, max_seq_len, doc_stride)
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index].inputs["input_ids"]))
        found: dict[int, _Candidates] = {}
        count = 2 * top_k + 10 if align_to_words else top_k
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            starts, ends = self._logits([windows[index] for index in batch])
            for index, start, end in zip(batch, starts, ends, strict=True):
                found[index] = _decode(windows[index], start, end, count, max_answer_len, align_to_words)
            if progress is not None:
                progress(len(found), len(windows))

        by_example: list[list[_Candidates]] = [[] for _ in questions]
        for index, window in enumerate(windows):
            by_example[window.example].append(found[index])
        answers = [
            _merge(candidates, text, top_k, handle_impossible_answer)
            for candidates, text in zip(by_example, contexts, strict=True)
        ]
        if top_k == 1:
            best = [answer[0] for answer in answers]
            return best[0] if single else best
        return answers[0] if single else answers

    def _lengths(self, max_seq_len: int | None, doc_stride: int | None) -> tuple[int, int]:
        """max_seq_len and doc_stride, with their defaults filled in."""
        positions = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        positions = positions if isinstance(positions, int) and positions > 0 else None
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, 384, positions or 384)
        _check_number("max_seq_len", max_seq_len, 1)
        if positions is not None and max_seq_len > positions:
            raise ValueError(f"max_seq_len: expected at most the model's {positions} positions, got {max_seq_len}")
        if doc_stride is None:
            doc_stride = min(max_seq_len // 2, 128)
        _check_number("doc_stride", doc_stride, 0)
        most = max_seq_len - self.tokenizer.num_special_tokens_to_add(pair=True)
        if doc_stride >= most:
            raise ValueError(
                f"doc_stride: expected less than max_seq_len without special tokens ({most}), got {doc_stride}"
            )
        return max_seq_len, doc_stride

    def _offsets(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """The characters of every text's tokens, without special ones."""
        options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        offsets: list[list[tuple[int, int]]] = []
        if texts:
            offsets = self.tokenizer(texts, return_offsets_mapping=True, **options)["offset_mapping"]
        return offsets

    def _fit(
        self, questions: list[str], contexts: list[str], max_question_len: int, max_seq_len: int, doc_stride: int
    ) -> list[str]:
        """The questions, cut where they are too long; an error where a window has no room for its context."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        fitting = []
        for question, context, tokens in zip(questions, contexts, self._offsets(questions), strict=True):
            if len(tokens) > max_question_len:
                question, tokens = question[: tokens[max_question_len - 1][1]], tokens[:max_question_len]
            # The tokenizer panics where a window would have no room for new tokens.
            room = max_seq_len - special - len(tokens)
            if room <= doc_stride and (room < 0 or len(self._offsets([context])[0]) > room):
                raise ValueError(
                    f"doc_stride: expected less than the {max(room, 0)} tokens that max_seq_len ({max_seq_len}) leaves "
                    f"a window of the context beside {special} special tokens and the question's {len(tokens)}, got "
                    f"{doc_stride} for the question {question[:60]!r}; lower doc_stride or max_question_len, or raise "
                    "max_seq_len"
                )
            fitting.append(question)
        return fitting

    def _windows(self, questions: list[str], contexts: list[str], max_seq_len: int, doc_stride: int) -> list[_Window]:
        """All windows, those of an example in the order of its context."""
        # Tokenizers that pad on the left are of models (XLNet) that were trained on context first.
        side = 1 if self.tokenizer.padding_side == "right" else 0
        cls = self.tokenizer.cls_token_id
        names = [*self.tokenizer.model_input_names, "attention_mask"]
        windows = []
        for first in range(0, len(questions), _TOKENIZE_AT_ONCE):
            pair = (questions[first : first + _TOKENIZE_AT_ONCE], contexts[first : first + _TOKENIZE_AT_ONCE])
            encoded = self.tokenizer(
                pair[1 - side],
                pair[side],
                truncation="only_second" if side == 1 else "only_first",
                max_length=max_seq_len,
                stride=doc_stride,
                padding=False,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=True,
            )
            for index, example in enumerate(encoded["overflow_to_sample_mapping"]):
                inputs = {name: encoded[name][index] for name in names if name in encoded}
                tokens = [place for place, of in enumerate(encoded.sequence_ids(index)) if of == side]
                context = slice(tokens[0], tokens[-1] + 1) if tokens else slice(0, 0)
                words = [-1 if word is None else word for word in encoded.word_ids(index)[context]]
                nulls = [] if cls is None else [place for place, id in enumerate(inputs["input_ids"]) if id == cls]
                offsets = np.array(encoded["offset_mapping"][index][context], np.int64).reshape(-1, 2)
                windows.append(_Window(first + example, inputs, context, nulls, offsets, np.array(words, np.int64)))
        return windows

    def _logits(self, windows: list[_Window]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The model's start and end logits, [B, S] each, with noise at padded positions."""
        padding = {
            "input_ids": self.tokenizer.pad_token_id or 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        length = max(len(window.inputs["input_ids"]) for window in windows)
        parameter = next(self.model.parameters(), None)
        device = None if parameter is None else parameter.device
        inputs = {}
        for name in windows[0].inputs:
            rows = [window.inputs[name] for window in windows]
            padded = [row + [padding.get(name, 0)] * (length - len(row)) for row in rows]
            inputs[name] = torch.tensor(padded, dtype=torch.long, device=device)
        with torch.inference_mode():
            output = self.model(**inputs)
            logits = [getattr(output, name, None) for name in ("start_logits", "end_logits")]
            expected = (len(windows), length)
            for value in logits:
                if not isinstance(value, torch.Tensor) or value.shape != expected:
                    got = (
                        f"{list(value.shape)}"
                        if isinstance(value, torch.Tensor)
                        else f"{type(output).__name__} without"
                    )
                    raise TypeError(
                        f"model: expected start_logits and end_logits of shape {list(expected)}, got {got} from "
                        f"{type(self.model).__name__}; load it with AutoModelForQuestionAnswering"
                    )
            start, end = (value.double().cpu().numpy() for value in logits if value is not None)
        return start, end


def _examples(question: Any, context: Any) -> tuple[list[str], list[str], bool]:
    """Questions and contexts of equal number, and whether it was a single question."""
    for name, value in (("question", question), ("context", context)):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)):
            raise TypeError(f"{name}: expected a str or a list of str, got {type(value).__name__}")
        for index, text in enumerate(texts):
            place = name if isinstance(value, str) else f"{name}[{index}]"
            if not isinstance(text, str):
                raise TypeError(f"{place}: expected a str, got {type(text).__name__}")
            if not text:
                raise ValueError(f"{place}: expected a text, got an empty one; leave it out or fill it in")
    if isinstance(question, str):
        if not isinstance(context, str):
            raise TypeError(
                f"context: expected a str, as the question is one, got a list of {len(context)}; repeat the question: "
                "question=[question] * len(context)"
            )
        return [question], [context], True
    contexts = [context] * len(question) if isinstance(context, str) else list(context)
    if len(contexts) != len(question):
        raise ValueError(
            f"context: expected one for each of the {len(question)} questions, or a single str for all, got a list of "
            f"{len(contexts)}"
        )
    return list(question), contexts, False


def _check_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


# ---------------------------------------------------------------------------------------- from logits to answers


def best_spans(
    start: NDArray[np.float64], end: NDArray[np.float64], count: int, max_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The spans of 1 to max_length tokens with the highest start[i] * end[j], i <= j.

    Args:
        start: P(an answer starts at token i), [n].
        end: P(an answer ends with token j), [n].
        count: spans to return, at most: all there are if fewer.
        max_length: of a span, in tokens.

    Returns: first tokens, last tokens and scores; best first, at equal scores the earlier, then the shorter one.
    """
    if not len(start):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    longest = min(max_length, len(start))
    firsts = np.repeat(np.arange(len(start)), longest)
    lasts = firsts + np.tile(np.arange(longest), len(start))
    inside = lasts < len(start)
    firsts, lasts = firsts[inside], lasts[inside]
    scores = start[firsts] * end[lasts]
    count = min(count, len(scores))
    enough = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    best = enough[np.argsort(-scores[enough], kind="stable")][:count]
    return firsts[best], lasts[best], scores[best]


def _decode(
    window: _Window,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    count: int,
    max_length: int,
    align_to_words: bool,
) -> _Candidates:
    """Logits [S or more] of one window to its best spans."""
    # CLS takes part in the softmax and in "no answer", never in a span; question and padding take no part.
    tokens = np.arange(window.context.start, window.context.stop)
    nulls = np.setdiff1d(window.nulls, tokens).astype(np.int64)
    places = np.concatenate((nulls, tokens))
    if not len(places):
        return _Candidates([], 0.0)
    logits = np.stack((start[places], end[places]))
    if not np.isfinite(logits).all():
        raise ValueError("model: expected finite logits, got NaN or infinity; check its weights, or run it in float32")
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    p_start, p_end = weights / weights.sum(-1, keepdims=True)
    firsts, lasts, scores = best_spans(p_start[len(nulls) :], p_end[len(nulls) :], count, max_length)
    spans = []
    for first, last, score in zip(firsts, lasts, scores, strict=True):
        if align_to_words and window.words[first] >= 0 and window.words[last] >= 0:
            first = np.flatnonzero(window.words == window.words[first])[0]
            last = np.flatnonzero(window.words == window.words[last])[-1]
        spans.append((float(score), int(window.offsets[first, 0]), int(window.offsets[last, 1])))
    return _Candidates(spans, float(p_start[0] * p_end[0]) if len(nulls) else 0.0)


def _merge(windows: list[_Candidates], context: str, top_k: int, handle_impossible_answer: bool) -> list[Answer]:
    """The answers to one question from its windows, best first; at least one."""
    answers: dict[str, Answer] = {}
    for window in windows:
        for score, start, end in window.spans:
            text = context[start:end]
            answer = answers.setdefault(text.lower(), Answer(score=0.0, start=start, end=end, answer=text))
            answer["score"] += score
    ranked = list(answers.values())
    if handle_impossible_answer:
        ranked.append(Answer(score=min(window.null_score for window in windows), start=0, end=0, answer=""))
    ranked.sort(key=lambda answer: -answer["score"])
    return ranked[:top_k] or [Answer(score=0.0, start=0, end=0, answer="")]
