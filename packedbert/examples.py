"""Labelled examples, one mapping each, and the padded batches that a model computes its loss of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import squad

#: The arguments of a model's forward for one example: lists (one value a token) or numbers (one an example).
Example = Mapping[str, Any]

_TOKENIZE_AT_ONCE = 256


def squad_training_examples(
    dataset: Mapping[str, Any], tokenizer: Any, max_length: int = 256, doc_stride: int = 128
) -> list[Example]:
    """Question answering as BERT is trained on it (Devlin et al. 2019, section 4.2): windows with start and end.

    Args:
        dataset: from `squad.load_squad`; the first gold answer of each question counts.
        tokenizer: a fast one.
        max_length: tokens of a window, question and special tokens included.
        doc_stride: tokens by which windows of one context overlap.

    Returns: an example for each window that holds the whole answer: input_ids, attention_mask, token_type_ids,
    start_positions and end_positions (tokens, both inclusive).

    Raises:
        ValueError: no window holds an answer.
    """
    labelled = list(squad.first_answers(dataset))
    examples: list[Example] = []
    for first in range(0, len(labelled), _TOKENIZE_AT_ONCE):
        part = labelled[first : first + _TOKENIZE_AT_ONCE]
        encoded = tokenizer(
            [question for question, *_ in part],
            [context for _, context, *_ in part],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
        )
        for window, index in enumerate(encoded["overflow_to_sample_mapping"]):
            _, _, start, end = part[index]
            tokens = [encoded.char_to_token(window, char, sequence_index=1) for char in (start, end - 1)]
            if None in tokens:
                continue
            inputs = {name: encoded[name][window] for name in tokenizer.model_input_names}
            examples.append({**inputs, "start_positions": tokens[0], "end_positions": tokens[1]})
    if not examples:
        raise ValueError(f"expected questions whose answer fits a window of {max_length} tokens, got none")
    return examples


def collate(
    examples: Sequence[Example], pad_token_id: int = 0, multiple: int = 1, most: int | None = None
) -> dict[str, Tensor]:
    """One batch: lists are padded on the right, [batch, length]; numbers become [batch].

    Args:
        examples: with the same keys.
        pad_token_id: for input_ids; token labels get -100, which losses ignore, and everything else 0.
        multiple: of which length is one: PyTorch's products are compiled for every length that is new to them.
        most: length that rounding up ends at, e.g. the model's positions.
    """
    padding = {"input_ids": pad_token_id, "labels": -100}
    batch = {}
    for name, value in examples[0].items():
        values = [example[name] for example in examples]
        if isinstance(value, (list, tuple)):
            longest = max(map(len, values))
            length = -(-longest // multiple) * multiple
            length = length if most is None else max(longest, min(length, most))
            values = [[*row, *[padding.get(name, 0)] * (length - len(row))] for row in values]
        batch[name] = torch.tensor(values)
    return batch


def batches(examples: Sequence[Example], batch_size: int, pad_token_id: int = 0) -> Iterator[dict[str, Tensor]]:
    """All examples in batches of about one length, the longest first: little is padded, and memory runs out early.

    Raises:
        ValueError: no examples, or some without input_ids or without labels.
    """
    check(examples)
    order = sorted(examples, key=lambda example: -len(example["input_ids"]))
    for first in range(0, len(order), batch_size):
        yield collate(order[first : first + batch_size], pad_token_id)


def check(examples: Sequence[Example]) -> None:
    """Refuse what nothing can be learned from.

    Raises:
        ValueError: no examples, or some without input_ids or without labels.
        TypeError: something else than mappings.
    """
    if not len(examples):
        raise ValueError("data: expected labelled examples, got none")
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise TypeError(
                f"data[{index}]: expected a mapping with input_ids and labels, got {type(example).__name__}; "
                "squad_training_examples makes them of a SQuAD file"
            )
        if "input_ids" not in example or not any(name.endswith(("labels", "positions")) for name in example):
            raise ValueError(
                f"data[{index}]: expected input_ids, and labels or start_positions and end_positions, got "
                f"{', '.join(example) or 'nothing'}"
            )
