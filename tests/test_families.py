"""A checkpoint of each family that nn_pruning published, from disk, against the masked model in float64.

Each family is built twice from the same weights, without our packing: as a stock model of transformers with zeros where
something was pruned, which gives the answers, and as the checkpoint that nn_pruning stores of it. They are small:
BERT-large is here with its 24 layers of 16 heads, of which a published model keeps 2 to 12, but with heads of 4
dimensions.
"""

import copy
import json
from typing import NamedTuple

import pytest
import torch
from models import COLUMNS_ZERO, KEPT, ROWS_ZERO, prune, tiny_bert, tiny_config
from op_cases import assert_as_exact_as_torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForQuestionAnswering

import packedbert
from packedbert import PackedBertConfig
from packedbert.bench import STRUCTURES


class Family(NamedTuple):
    """A pruned model.

    Attributes:
        masked: stock, float32, of full width.
        not_stored: heads that the checkpoint leaves out, by layer (`pruned_heads`).
        left: heads, FFN rows and (None: as before) head size that packing has to leave of each layer.
    """

    masked: nn.Module
    not_stored: dict[int, list[int]]
    left: list[tuple[tuple[int, ...], int, int | None]]


def stock_model(**changes) -> nn.Module:
    """A model whose tokens stay different, however wide or deep it is."""
    model = tiny_bert("BertForQuestionAnswering", tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "encoder" in name:
                parameter.mul_((32 / model.config.hidden_size) ** 0.5)
            if "output.dense" in name or "LayerNorm.bias" in name:  # what all tokens get alike adds up
                parameter.mul_(1 / model.config.num_hidden_layers**0.5)
    return model


@torch.no_grad()
def without_heads(model: nn.Module, not_stored: dict[int, list[int]]) -> nn.Module:
    """Zero heads that the checkpoint doesn't have: weights, and the biases that leave nothing behind."""
    for index, heads in not_stored.items():
        layer = model.bert.encoder.layer[index].attention
        size = layer.self.attention_head_size
        for head in heads:
            span = slice(head * size, (head + 1) * size)
            for part in (layer.self.query, layer.self.key, layer.self.value):
                part.weight[span] = 0
                part.bias[span] = 0
            layer.output.dense.weight[:, span] = 0
    return model


def without_rows(model: nn.Module, widths: list[int]) -> nn.Module:
    """Zero FFN rows, every other one by its output column, until so many are left; biases stay."""
    config = model.config
    heads = [[KEPT] * config.num_attention_heads] * config.num_hidden_layers
    rows = []
    for layer, width in enumerate(widths):
        gone = config.intermediate_size - width
        kinds = [KEPT] * width + [ROWS_ZERO, COLUMNS_ZERO] * (gone // 2) + [ROWS_ZERO] * (gone % 2)
        order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(layer))
        rows.append([kinds[i] for i in order])
    return prune(model, heads, rows)


def others(count: int, gone: list[int]) -> tuple[int, ...]:
    return tuple(head for head in range(count) if head not in gone)


def dense() -> Family:
    return Family(stock_model(), {}, [((0, 1, 2, 3), 40, None)] * 2)


def heads_only() -> Family:
    """A layer without any head, too."""
    not_stored = {0: [2], 1: [0, 1, 2, 3]}
    return Family(without_heads(stock_model(), not_stored), not_stored, [((0, 1, 3), 40, None), ((), 40, None)])


def hybrid_filled(**changes) -> Family:
    """As the seed is stored: heads gone, FFN of full width with zero rows and columns, and a layer of them."""
    not_stored = {0: [1, 3], 2: [0]}
    model = without_rows(stock_model(num_hidden_layers=3, **changes), [17, 0, 33])
    left = [((0, 2), 17, None), ((0, 1, 2, 3), 0, None), ((1, 2, 3), 33, None)]
    return Family(without_heads(model, not_stored), not_stored, left)


def opt() -> Family:
    """The "-opt-" models: NoNorm and ReLU."""
    return hybrid_filled(hidden_act="relu", layer_norm_type="no_norm")


def large() -> Family:
    published = STRUCTURES["large-f91.0"]
    widths = [width // 16 for width in published.ffn_widths]
    model = stock_model(hidden_size=64, num_attention_heads=16, num_hidden_layers=24, intermediate_size=256)
    not_stored = {
        layer: torch.randperm(16, generator=torch.Generator().manual_seed(layer))[heads:].tolist()
        for layer, heads in enumerate(published.heads)
    }
    left = [(others(16, not_stored[layer]), width, None) for layer, width in enumerate(widths)]
    return Family(without_heads(without_rows(model, widths), not_stored), not_stored, left)


@torch.no_grad()
def hybrid() -> Family:
    """Not filled: zero blocks of 32 x 32 and zero rows inside heads of 64 dimensions that are left. Biases stay."""
    model = stock_model(hidden_size=256, num_attention_heads=4, num_hidden_layers=4, intermediate_size=96)
    not_stored = {3: [1]}
    random = torch.Generator().manual_seed(0)
    blocks, scattered, one_whole, few = (layer.attention for layer in model.bert.encoder.layer)

    def rows(head: int, dimensions) -> torch.Tensor:
        return 64 * head + torch.as_tensor(dimensions)

    def some(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """So many of 64 dimensions, and the others."""
        order = torch.randperm(64, generator=random)
        return order[:count], order[count:]

    halves = torch.arange(64).view(2, 32)
    for layer in (blocks, one_whole):
        for head in range(4):
            if layer is one_whole and head == 2:
                continue
            layer.self.key.weight[rows(head, halves[head % 2])] = 0
            layer.self.query.weight[rows(head, halves[head % 2])] = 0  # its biases don't matter: the keys are zero
            if head < 2:
                layer.self.value.weight[rows(head, halves[head // 2])] = 0
            else:
                layer.output.dense.weight[:, rows(head, halves[head // 2])] = 0
    blocks.self.query.weight[:32, 64:96] = 0  # blocks that leave no row without weights
    blocks.self.value.weight[32:64, 128:192] = 0

    for head in range(4):
        _, gone = some(20 + 5 * head)
        scattered.self.key.weight[rows(head, gone[::2])] = 0
        scattered.self.query.weight[rows(head, gone[1::2])] = 0
        scattered.self.query.bias[rows(head, gone[1::2])] = 0
        _, gone = some(37 - 3 * head)
        scattered.self.value.weight[rows(head, gone[::3])] = 0
        scattered.output.dense.weight[:, rows(head, gone[1::3])] = 0
        scattered.self.value.weight[rows(head, gone[2::3])] = 0
        scattered.output.dense.weight[:, rows(head, gone[2::3])] = 0

    few.self.value.weight[rows(0, range(64))] = 0  # this head goes, and leaves its value biases behind
    few.self.key.weight[rows(2, range(64))] = 0  # this one averages its values
    few.self.value.weight[rows(2, range(12, 64))] = 0
    few.self.key.weight[rows(3, range(51))] = 0  # the last row stays, where a padding of -1 would point
    few.self.query.weight[rows(3, range(51, 54))] = 0  # but their biases still weigh the keys: they have to stay
    few.self.query.bias[rows(3, range(51, 54))] = 2
    few.output.dense.weight[:, rows(3, range(48))] = 0

    model = without_rows(model, [96, 50, 31, 0])
    left = [((0, 1, 2, 3), 96, 32), ((0, 1, 2, 3), 50, 40), ((0, 1, 2, 3), 31, None), ((2, 3), 0, 16)]
    return Family(without_heads(model, not_stored), not_stored, left)


FAMILIES = {
    "dense": dense,
    "heads only": heads_only,
    "hybrid, filled": hybrid_filled,
    "hybrid, not filled": hybrid,
    "opt": opt,
    "large": large,
}


class _NoNorm(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.bias


def as_trained(masked: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The masked model in stock modules, which know no NoNorm, and have eager attention to show."""
    model = copy.deepcopy(masked).to(dtype)
    model.set_attn_implementation("eager")
    if getattr(model.config, "layer_norm_type", None) == "no_norm":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.LayerNorm):
                model.set_submodule(name, _NoNorm(module))
    return model


def write_checkpoint(folder, family: Family) -> None:
    """As nn_pruning stores it: rows of `not_stored` heads are cut out."""
    config, state = family.masked.config, dict(family.masked.state_dict())
    size = config.hidden_size // config.num_attention_heads
    for layer, gone in family.not_stored.items():
        kept = others(config.num_attention_heads, gone)
        places = torch.tensor([head * size + d for head in kept for d in range(size)], dtype=torch.long)
        prefix = f"bert.encoder.layer.{layer}.attention."
        for name in ("query", "key", "value"):
            for part in ("weight", "bias"):
                state[f"{prefix}self.{name}.{part}"] = state[f"{prefix}self.{name}.{part}"][places]
        state[f"{prefix}output.dense.weight"] = state[f"{prefix}output.dense.weight"][:, places]
    settings = {**config.to_dict(), "architectures": ["BertForQuestionAnswering"]}
    settings["pruned_heads"] = {str(layer): gone for layer, gone in family.not_stored.items()}
    (folder / "config.json").write_text(json.dumps(settings))
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Sequences: whole, padded on the right, on the left, with a hole, of one token."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(5, 20, dtype=torch.long)
    mask[1, 13:] = 0
    mask[2, :6] = 0
    mask[3, 4:9] = 0
    mask[4, 1:] = 0
    return {
        "input_ids": torch.randint(model.config.vocab_size, mask.shape, generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(2, mask.shape, generator=generator),
    }


def answers(model: nn.Module) -> torch.Tensor:
    """Start and end logits of the real tokens, [2, tokens]."""
    batch = batch_of(model)
    with torch.no_grad():
        output = model(**batch)
    return torch.stack([output.start_logits, output.end_logits])[:, batch["attention_mask"] != 0]


class Case(NamedTuple):
    family: Family
    folder: str
    exact: torch.Tensor  # the masked model's answers, float64
    rounded: torch.Tensor  # PyTorch's own in float32


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> Case:
    family = FAMILIES[request.param]()
    folder = tmp_path_factory.mktemp("family")
    write_checkpoint(folder, family)
    exact, rounded = (answers(as_trained(family.masked, dtype)) for dtype in (torch.float64, torch.float32))
    assert exact.std(1).min() > 0.1  # not the same for all tokens, which would hide much
    return Case(family, folder, exact, rounded)


def stored_layers(folder) -> list[dict]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]


# ------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_same_answers(case, backend):
    model = packedbert.load(case.folder, config=PackedBertConfig(backend=backend))
    assert_as_exact_as_torch(answers(model), case.rounded, case.exact)


def test_what_is_left(case):
    model = packedbert.load(case.folder)
    report = model.packedbert_report
    assert [tuple(layer) for layer in report.structure.layers] == case.family.left
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    encoder = sum(layer.parameters_after for layer in report.layers)
    assert encoder == sum(parameter.numel() for parameter in model.bert.encoder.parameters())
    for layer in report.structure.layers:
        assert layer.head_size is None or f"{len(layer.heads)} x {layer.head_size}" in str(report)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_int8_gives_nearly_the_same_answers(case, backend):
    model = packedbert.load(case.folder, config=PackedBertConfig(precision="int8", backend=backend))
    assert 0 < (answers(model) - case.exact).norm() / case.exact.norm() < 0.05


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_saved_packed_and_loaded_bit_for_bit(case, precision, tmp_path):
    model = packedbert.load(case.folder, config=PackedBertConfig(precision=precision))
    model.save_pretrained(tmp_path)
    for again in (packedbert.load(tmp_path), AutoModelForQuestionAnswering.from_pretrained(tmp_path)):
        assert torch.equal(answers(again), answers(model))
        one, other = again.state_dict(), model.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert again.packedbert_report.structure == model.packedbert_report.structure
        assert again.packedbert_report.parameters_before == model.packedbert_report.parameters_after
    # Where no head is narrower, config.json is what it was before a head could be.
    sizes = [layer.get("head_size") for layer in stored_layers(tmp_path)]
    assert sizes == [head_size for _, _, head_size in case.family.left]
    for layer, head_size in zip(stored_layers(tmp_path), sizes, strict=True):
        assert ("head_size" in layer) == (head_size is not None)


def test_attentions_are_those_of_the_heads_that_are_left(case):
    masked, model = as_trained(case.family.masked, torch.float64), packedbert.load(case.folder)
    batch = batch_of(model)
    with torch.no_grad():
        exact, got = (m(**batch, output_attentions=True).attentions for m in (masked, model))
    queries = (batch["attention_mask"] != 0)[:, None, :, None]
    for ours, theirs, (heads, _, _) in zip(got, exact, case.family.left, strict=True):
        kept = theirs[:, list(heads)]
        torch.testing.assert_close(ours.double() * queries, kept * queries, rtol=0, atol=2e-5)


# -------------------------------------------------------------------------------------------- narrower heads


@pytest.fixture
def narrow(tmp_path):
    """The checkpoint with zeros inside heads."""
    write_checkpoint(tmp_path, hybrid())
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("forgotten", ["query bias", "value bias", "scale"])
def test_a_wrong_rule_would_be_seen(forgotten):
    """Each thing that packing has to mind moves the answers of this family by far more than rounding."""
    model, damaged = hybrid().masked, hybrid().masked
    layers = [layer.attention.self for layer in damaged.bert.encoder.layer]
    if forgotten == "query bias":
        layers[3].query.bias[3 * 64 + 51 : 3 * 64 + 54] = 0
    elif forgotten == "value bias":
        layers[0].value.bias[:32] = 0
    else:
        layers[1].query.weight.mul_((64 / 40) ** 0.5)
        layers[1].query.bias.mul_((64 / 40) ** 0.5)
    assert (answers(damaged) - answers(model)).abs().max() > 1e-3


def test_half_precision(narrow):
    """Queries are rounded once more, in the dtype that they are stored in."""
    exact = answers(hybrid().masked.to(torch.bfloat16).double())
    stock = answers(hybrid().masked.to(torch.bfloat16))
    for options in ({"dtype": torch.bfloat16}, {"config": PackedBertConfig(precision="bf16")}):
        got = answers(packedbert.load(narrow, **options))
        assert (got - exact).norm() <= 2 * (stock - exact).norm()


def test_calibrated_released_and_compiled(narrow):
    stock = hybrid().masked
    expected = answers(stock)
    calibration = packedbert.calibrate(stock, [batch_of(stock)])
    model = packedbert.patch_model(stock, precision="int8", calibration=calibration)
    assert (answers(model) - expected).norm() / expected.norm() < 0.05
    released = packedbert.load(narrow, config=PackedBertConfig(release_weights=True))
    assert torch.equal(answers(released), answers(packedbert.load(narrow)))
    compiled = torch.compile(released, fullgraph=True, backend="eager")
    torch.testing.assert_close(answers(compiled), answers(released))  # eagerly the head is another kernel


def test_head_sizes_that_cannot_be_are_refused(narrow, tmp_path):
    packed = tmp_path / "packed"
    packedbert.load(narrow).save_pretrained(packed)
    settings = json.loads((packed / "config.json").read_text())

    def refuse(head_size, text):
        changed = copy.deepcopy(settings)
        changed["quantization_config"]["layers"][0]["head_size"] = head_size
        (packed / "config.json").write_text(json.dumps(changed))
        for load in (packedbert.load, AutoModelForQuestionAnswering.from_pretrained):
            with pytest.raises(ValueError, match=text):
                load(packed)

    refuse(0, r"layer 0: expected a head size of 1 to 64 \(config\.hidden_size / .*\), got 0")
    refuse(65, "layer 0: expected a head size of 1 to 64 .*, got 65")
    refuse("wide", r'quantization_config\.layers: expected \{"heads"')
    refuse(31, r"encoder\.layer\.0\.qkv\.weight: expected \[372, 256\] .*, got \[384, 256\]")
    refuse(None, r"encoder\.layer\.0\.qkv\.weight: expected \[768, 256\] .*, got \[384, 256\]")
