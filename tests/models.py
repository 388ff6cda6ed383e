"""Small BERTs with every kind of pruning, built here so that the tests need no file and no network."""

from collections.abc import Sequence

import torch
import transformers
from torch import nn
from transformers import BertConfig

#: What can be zero in a removed head or FFN row.
KEPT, ROWS_ZERO, COLUMNS_ZERO = "kept", "rows are zero", "columns are zero"

#: What can be zero in a dimension of a head's queries and keys. The first two have to be kept.
QUERY_ZERO, QUERY_GONE, KEY_ZERO = "query row is zero", "query row and bias are zero", "key row is zero"
QUERY_KEY_KINDS = (KEPT, QUERY_ZERO, QUERY_GONE, KEY_ZERO)

ARCHITECTURES = (
    "BertModel",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
)


def tiny_config(**changes) -> BertConfig:
    """Two layers of four heads of 8 dimensions."""
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 24,
        **changes,
    }
    return BertConfig(**settings)


def tiny_bert(architecture: str = "BertModel", config: BertConfig | None = None, seed: int = 0):
    """A model with weights that are not small, biases that are not zero, in evaluation mode."""
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config or tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2 if name.endswith("weight") else 0.3)
    return model


def encoder_of(model: nn.Module) -> nn.Module:
    """The BertEncoder (or what replaced it) of any of ARCHITECTURES."""
    return getattr(model, "bert", model).encoder


@torch.no_grad()
def prune(model: nn.Module, heads: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> nn.Module:
    """Zero weights in place, never biases: what nn_pruning's masks leave, with constants still to be folded.

    Args:
        model: from `tiny_bert`.
        heads: KEPT, ROWS_ZERO or COLUMNS_ZERO for every head of every layer.
        rows: the same for every FFN row.
    """
    for layer, head_kinds, row_kinds in zip(encoder_of(model).layer, heads, rows, strict=True):
        attention, size = layer.attention, layer.attention.self.attention_head_size
        for head, kind in enumerate(head_kinds):
            span = slice(head * size, (head + 1) * size)
            if kind == ROWS_ZERO:
                for part in (attention.self.query, attention.self.key, attention.self.value):
                    part.weight[span] = 0
            elif kind == COLUMNS_ZERO:
                attention.output.dense.weight[:, span] = 0
        for row, kind in enumerate(row_kinds):
            if kind == ROWS_ZERO:
                layer.intermediate.dense.weight[row] = 0
            elif kind == COLUMNS_ZERO:
                layer.output.dense.weight[:, row] = 0
    return model


@torch.no_grad()
def prune_dimensions(
    model: nn.Module, query_key: Sequence[Sequence[Sequence[str]]], value: Sequence[Sequence[Sequence[str]]]
) -> nn.Module:
    """Zero dimensions within heads, in place.

    Args:
        model: from `tiny_bert`.
        query_key: one of QUERY_KEY_KINDS for every dimension of every head of every layer.
        value: KEPT, ROWS_ZERO or COLUMNS_ZERO for every dimension of every head of every layer.
    """
    for layer, of_queries, of_values in zip(encoder_of(model).layer, query_key, value, strict=True):
        attention = layer.attention.self
        for row, kind in enumerate(kind for head in of_queries for kind in head):
            if kind in (QUERY_ZERO, QUERY_GONE):
                attention.query.weight[row] = 0
            if kind == QUERY_GONE:
                attention.query.bias[row] = 0
            if kind == KEY_ZERO:
                attention.key.weight[row] = 0
        for row, kind in enumerate(kind for head in of_values for kind in head):
            if kind == ROWS_ZERO:
                attention.value.weight[row] = 0
            elif kind == COLUMNS_ZERO:
                layer.attention.output.dense.weight[:, row] = 0
    return model


def some_pruning(config: BertConfig, seed: int = 0) -> tuple[list[list[str]], list[list[str]]]:
    """Arguments of `prune`: about half of everything goes, and the last layer loses all it has."""
    generator = torch.Generator().manual_seed(seed)
    kinds = (KEPT, KEPT, ROWS_ZERO, COLUMNS_ZERO)

    def draw(count: int) -> list[str]:
        return [kinds[int(i)] for i in torch.randint(4, (count,), generator=generator)]

    heads = [draw(config.num_attention_heads) for _ in range(config.num_hidden_layers)]
    rows = [draw(config.intermediate_size) for _ in range(config.num_hidden_layers)]
    heads[-1] = [ROWS_ZERO] * config.num_attention_heads
    rows[-1] = [ROWS_ZERO] * config.intermediate_size
    return heads, rows


def inputs(
    config: BertConfig, lengths: Sequence[int], length: int | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and token_type_ids of a right-padded batch with sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), length or max(lengths))
    mask = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    return {
        "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(2, shape, generator=generator),
    }
