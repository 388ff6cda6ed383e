"""prune_model: importance, search, reconstruction, what is written, and what is refused."""

import copy
import itertools
import json

import pytest
import torch
from models import tiny_bert, tiny_config
from transformers import AutoModelForQuestionAnswering

import packedbert
from packedbert import bench, cost, examples, prune
from packedbert.cost import ROW_BLOCK, CostModel
from packedbert.structure import plan_layer


def config(**changes):
    return tiny_config(num_hidden_layers=3, intermediate_size=96, **changes)


@pytest.fixture(scope="module")
def model():
    return tiny_bert("BertForQuestionAnswering", config())


@pytest.fixture(scope="module")
def data():
    """Sixty-four examples of 4 to 20 tokens."""
    random = torch.Generator().manual_seed(1)
    found = []
    for _ in range(64):
        length = int(torch.randint(4, 21, (1,), generator=random))
        start, end = torch.randint(length, (2,), generator=random).sort().values.tolist()
        ids = torch.randint(1, 61, (length,), generator=random).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "start_positions": start, "end_positions": end})
    return found


@pytest.fixture(scope="module")
def flops(model):
    return cost.flops(prune.structure_of(model.config), 2, 16)


def logits(model, batch):
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    real = batch["attention_mask"] != 0
    return torch.stack([output.start_logits, output.end_logits])[:, real]


# ----------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("widths", [((4, 96),) * 3, ((1, 32), (0, 0), (3, 64))])
def test_flops_are_those_of_bench(flops, widths):
    heads, rows = zip(*widths, strict=True)
    shape = bench.Structure("", heads, rows, 32, 4, 96, 61, 24)
    assert flops.of(widths) == shape.flops(2, 16)


def test_a_width_in_between_costs_as_much_as_the_whole_block(flops):
    assert flops.of([(1, 33)] * 3) == flops.of([(1, 64)] * 3) > flops.of([(1, 32)] * 3)


def test_measured_costs_rise_with_heads_and_rows(monkeypatch):
    monkeypatch.setattr(cost, "_ROUNDS", 2)
    told = []
    structure = bench.Structure("", (3,) * 2, (80,) * 2, 24, 3, 80, 50, 16)
    costs = cost.measured(structure, 2, 8, progress=lambda *done: told.append(done))
    assert (len(costs.heads), len(costs.rows)) == (4, 4)
    assert told[-1][0] == told[-1][1] == len(told)
    assert costs.unit == "s"
    assert costs.about.startswith("measured at batch 2, length 8, fp32")
    for curve in (costs.heads, costs.rows):
        assert all(before <= after for before, after in itertools.pairwise(curve))
        assert curve[0] == 0


# ----------------------------------------------------------------------------------------------- importance


def test_gate_gradients_are_those_of_finite_differences(model, data):
    # Of one length: transformers' loss takes the softmax over padded positions too.
    ordered = [
        {**example, **{name: (example[name] * 5)[:12] for name in ("input_ids", "attention_mask")}}
        for example in data
        if example["end_positions"] < 12
    ][:5]
    found = prune.gate_gradients(model, ordered)
    double, step = copy.deepcopy(model).double(), 1e-5

    def loss(example, place, columns, factor):
        layer = double.bert.encoder.layer[place[0]]
        matrix = (layer.attention.output if place[1] == "heads" else layer.output).dense.weight
        with torch.no_grad():
            before = matrix[:, columns].clone()
            matrix[:, columns] = before * factor
            value = double(**examples.collate([example])).loss.item()
            matrix[:, columns] = before
        return value

    for row, example in enumerate(ordered):
        for layer, unit in ((0, 3), (2, 1)):
            for kind, columns in (("heads", slice(8 * unit, 8 * unit + 8)), ("rows", slice(unit, unit + 1))):
                up, down = (loss(example, (layer, kind), columns, 1 + sign * step) for sign in (1, -1))
                expected = (up - down) / (2 * step)
                assert getattr(found, kind)[layer][row, unit].item() == pytest.approx(expected, rel=2e-3, abs=2e-5)


def test_gradients_leave_the_model_as_it_was(data):
    model = tiny_bert("BertForQuestionAnswering", config()).train()
    model.qa_outputs.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    prune.gate_gradients(model, data[:3])
    assert model.training
    assert not model.qa_outputs.bias.requires_grad
    assert model.qa_outputs.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --------------------------------------------------------------------------------------------------- search


def random_gradients(seed, layers=2, heads=3, rows=64):
    random = torch.Generator().manual_seed(seed)
    scale = torch.rand(layers, generator=random) + 0.2
    return prune.GateGradients(
        [scale[i] * torch.randn(40, heads, generator=random) for i in range(layers)],
        [scale[i] * torch.randn(40, rows, generator=random) * 0.2 for i in range(layers)],
    )


def lost(gradients, kept):
    """The loss that the Fisher information's diagonal expects of what is gone."""
    total = 0.0
    for index, layer in enumerate(kept):
        for gradient, left in ((gradients.heads[index], layer.heads), (gradients.rows[index], layer.ffn_rows)):
            gone = [unit for unit in range(gradient.shape[1]) if unit not in left]
            total += gradient[:, gone].double().square().sum().item()
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.6, 0.7, 0.85])
def test_the_search_is_near_the_best_of_all_choices(seed, share, monkeypatch):
    monkeypatch.setattr(prune, "rearrange", lambda fisher, keep: keep)  # what is judged here is how many are kept
    gradients = random_gradients(seed)
    costs = CostModel((0.0, 1.0, 1.5, 2.5), (0.0, 2.0, 3.0), 0.5, "FLOP", "a test")
    dense = costs.of([(3, 64)] * 2)
    kept = prune.choose(gradients, costs, share * dense)
    assert costs.of([(len(layer.heads), len(layer.ffn_rows)) for layer in kept]) <= share * dense

    def best_units(gradient, count):
        return tuple(gradient.double().square().sum(0).argsort(descending=True)[:count].sort().values.tolist())

    best = min(
        lost(
            gradients,
            [
                prune.Kept(best_units(gradients.heads[i], h[i]), best_units(gradients.rows[i], r[i] * ROW_BLOCK))
                for i in range(2)
            ],
        )
        for h in itertools.product((1, 2, 3), repeat=2)
        for r in itertools.product((1, 2), repeat=2)
        if costs.of(list(zip(h, [ROW_BLOCK * block for block in r], strict=True))) <= share * dense
    )
    assert lost(gradients, kept) <= 1.25 * best + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_rearranging_never_makes_it_worse_and_is_often_the_best(seed):
    random = torch.Generator().manual_seed(seed)
    gradient = torch.randn(30, 6, generator=random, dtype=torch.double) @ torch.randn(
        6, 6, generator=random, dtype=torch.double
    )
    fisher = gradient.t() @ gradient
    keep = torch.zeros(6, dtype=torch.bool)
    keep[fisher.diagonal().argsort(descending=True)[:3]] = True

    def loss(kept):
        gone = [unit for unit in range(6) if unit not in kept]
        return fisher[gone][:, gone].sum().item()

    after = prune.rearrange(fisher, keep.clone())
    assert int(after.sum()) == 3
    found = loss(after.nonzero().flatten().tolist())
    assert found <= loss(keep.nonzero().flatten().tolist()) + 1e-9
    # No single exchange is left that lowers it.
    kept = after.nonzero().flatten().tolist()
    for out, into in itertools.product(kept, set(range(6)) - set(kept)):
        assert found <= loss([*(unit for unit in kept if unit != out), into]) + 1e-9


def test_what_contributes_nothing_goes_first(data):
    model = tiny_bert("BertForQuestionAnswering", config())
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight[:, 8:16] = 0  # head 1
            layer.output.dense.weight[:, :32] = 0
    costs = cost.flops(prune.structure_of(model.config), 2, 16)
    target = costs.of([(4, 96)] * 3) / costs.of([(3, 64)] * 3)
    pruned = packedbert.prune_model(model, data, target, cost_model=costs, reconstruct=False)
    for layer in pruned.packedbert_pruning.kept:
        assert layer.heads == (0, 2, 3)
        assert layer.ffn_rows == tuple(range(32, 96))
    batch = examples.collate(data[:8])
    assert torch.allclose(logits(pruned, batch), logits(model, batch), atol=1e-5)


# --------------------------------------------------------------------------------------------- prune_model


@pytest.mark.parametrize("method", prune.METHODS)
def test_a_pruned_model_meets_its_target_and_patches_to_the_same_answers(model, data, flops, method):
    before = copy.deepcopy(model.state_dict())
    told = []
    pruned = packedbert.prune_model(
        model, data, 1.8, method=method, cost_model=flops, progress=lambda *step: told.append(step)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    did = pruned.packedbert_pruning
    assert did.speedup >= 1.8
    assert did.dense_cost / did.pruned_cost == did.speedup
    assert told[-1] == ("reconstruction", 6, 6)
    batch = examples.collate(data[:9])
    exact = logits(copy.deepcopy(pruned).double(), batch)
    packed = packedbert.patch_model(copy.deepcopy(pruned))
    assert (logits(packed, batch) - exact).abs().max() < 2e-5
    for layer, kept in zip(packed.packedbert_report.layers, did.kept, strict=True):
        assert (layer.heads, layer.ffn_width) == (kept.heads, len(kept.ffn_rows))


def test_importance_and_costs_serve_several_targets(model, data, flops):
    importance = prune.gate_gradients(model, data)
    for target in (1.3, 2.0):
        once = packedbert.prune_model(model, data, target, method=importance, cost_model=flops, reconstruct=False)
        anew = packedbert.prune_model(model, data, target, cost_model="flops", batch=2, length=16, reconstruct=False)
        assert once.packedbert_pruning.kept == anew.packedbert_pruning.kept


def test_reconstruction_brings_the_model_nearer_to_the_dense_one(model, data, flops):
    batch = examples.collate(data[:32])
    exact = logits(model, batch)
    away = {
        fitted: (
            logits(packedbert.prune_model(model, data, 1.8, cost_model=flops, reconstruct=fitted), batch) - exact
        ).square().mean().item()
        for fitted in (False, True)
    }  # fmt: skip
    assert away[True] < 0.5 * away[False]


def test_least_squares_against_a_solver(monkeypatch):
    monkeypatch.setattr(prune, "RIDGE", 0.05)
    x, y = torch.randn(50, 6), torch.randn(50, 3)
    weight, bias = torch.randn(3, 6), torch.randn(3)
    fit = prune._LeastSquares(weight, bias)
    for part in (slice(0, 20), slice(20, 50)):
        fit.add(x[part], y[part])
    found, found_bias = fit.solve()
    # The penalty as rows of its own: sqrt(ridge) (W - weight) = 0; a column of ones for the bias.
    ridge = 0.05 * x.double().square().sum(0).mean().sqrt().square()
    rows = torch.cat([x.double(), ridge.sqrt() * torch.eye(6).double()])
    ones = torch.cat([torch.ones(50, 1), torch.zeros(6, 1)]).double()
    wanted = torch.cat([y.double(), ridge.sqrt() * weight.double().t()])
    solved = torch.linalg.lstsq(torch.cat([rows, ones], 1), wanted).solution
    assert torch.allclose(found.double(), solved[:6].t(), atol=1e-5)
    assert torch.allclose(found_bias.double(), solved[6], atol=1e-5)


def test_a_model_with_a_classifier(data):
    model = tiny_bert("BertForSequenceClassification", config(num_labels=3))
    labelled = [
        {"input_ids": example["input_ids"], "attention_mask": example["attention_mask"], "labels": index % 3}
        for index, example in enumerate(data)
    ]
    pruned = packedbert.prune_model(model, labelled, 1.5, cost_model="flops", batch=2, length=16)
    assert pruned.packedbert_pruning.speedup >= 1.5


def test_head_numbers_of_a_hybrid_model_with_narrow_heads(data):
    """Dimensions inside heads that are zero stay zero, and the fit leaves them out."""
    model = tiny_bert("BertForQuestionAnswering", config(hidden_size=64, num_attention_heads=2))
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for head in range(2):
                gone = slice(32 * head + 8, 32 * head + 32)
                for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                    linear.weight[gone], linear.bias[gone] = 0, 0
                layer.attention.output.dense.weight[:, gone] = 0
    pruned = packedbert.prune_model(model, data, 1.2, cost_model="flops", batch=2, length=16)
    for layer in pruned.bert.encoder.layer:
        assert not layer.attention.output.dense.weight[:, 8:32].any()
    batch = examples.collate(data[:8])
    exact = logits(copy.deepcopy(pruned).double(), batch)
    assert (logits(packedbert.patch_model(pruned), batch) - exact).abs().max() < 2e-5


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": 1.0}, "target: expected a speed-up of more than 1, got 1"),
        ({"target": float("nan")}, "target: expected a speed-up of more than 1"),
        ({"target": 50.0}, "target: expected at most .*x, which one head and 32 FFN rows a layer .* got 50x"),
        ({"method": "random"}, "method: expected one of fisher, magnitude, got 'random'"),
        ({"cost_model": "guess"}, "cost_model: expected one of measured, flops, or a CostModel, got 'guess'"),
        ({"data": []}, "data: expected labelled examples, got none"),
        ({"data": [{"input_ids": [1, 2]}]}, r"data\[0\]: expected input_ids, and labels or start_positions"),
    ],
)
def test_refused(model, data, flops, changes, text):
    arguments = {"data": data, "target": 1.5, "cost_model": flops, **changes}
    with pytest.raises(ValueError, match=text):
        packedbert.prune_model(model, arguments.pop("data"), **arguments)


def test_a_packed_model_is_refused(model, data, flops):
    with pytest.raises(ValueError, match="expected a stock model, got one that is packed already"):
        packedbert.prune_model(packedbert.patch_model(copy.deepcopy(model)), data, 1.5, cost_model=flops)
    with pytest.raises(TypeError, match="expected a model with one BertModel in it"):
        packedbert.prune_model(torch.nn.Linear(2, 2), data, 1.5, cost_model=flops)


def test_labels_that_the_model_has_no_loss_for(data, flops):
    model = tiny_bert("BertForQuestionAnswering", config())
    wrong = [{"input_ids": example["input_ids"], "start_positions": 0} for example in data[:2]]
    with pytest.raises(ValueError, match="expected labels that BertForQuestionAnswering computes a loss of"):
        packedbert.prune_model(model, wrong, 1.5, cost_model=flops)
    with torch.no_grad():
        model.qa_outputs.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected a finite loss, got nan"):
        packedbert.prune_model(model, data, 1.5, cost_model=flops)


# --------------------------------------------------------------------------------------------- checkpoints


def test_what_is_saved_is_nn_prunings_format(model, data, flops, tmp_path):
    pruned = packedbert.prune_model(model, data, 2.0, cost_model=flops)
    before = copy.deepcopy(pruned.state_dict())
    packedbert.save_pruned(pruned, tmp_path / "new" / "folder")
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())
    stored = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    kept = pruned.packedbert_pruning.kept
    gone = {str(i): sorted({0, 1, 2, 3} - set(layer.heads)) for i, layer in enumerate(kept) if len(layer.heads) < 4}
    assert gone
    assert stored["pruned_heads"] == gone
    assert stored["architectures"] == ["BertForQuestionAnswering"]
    batch = examples.collate(data[:8])
    exact = logits(copy.deepcopy(pruned).double(), batch)
    loaded = packedbert.load(tmp_path / "new" / "folder")
    assert (logits(loaded, batch) - exact).abs().max() < 2e-5
    report = loaded.packedbert_report
    assert [layer.heads for layer in report.layers] == [layer.heads for layer in kept]
    # And packed, which reloads by itself.
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, batch), logits(loaded, batch))
    with pytest.raises(ValueError, match="save_pruned: expected a model that is not packed"):
        packedbert.save_pruned(loaded, tmp_path)


def test_pruned_rows_and_heads_are_zero_as_nn_pruning_stores_them(model, data, flops):
    pruned = packedbert.prune_model(model, data, 2.0, cost_model=flops)
    for layer, kept in zip(pruned.bert.encoder.layer, pruned.packedbert_pruning.kept, strict=True):
        rows = (layer.intermediate.dense.weight != 0).any(1)
        assert tuple(rows.nonzero().flatten().tolist()) == kept.ffn_rows
        assert not layer.intermediate.dense.bias[~rows].any()
        assert not layer.output.dense.weight[:, ~rows].any()


def test_plan_layer_takes_a_layer_that_stores_no_heads():
    hidden, rows = 16, 8
    shapes = [(0, hidden), (0,)] * 3 + [(hidden, 0), (hidden,), (hidden,), (hidden,)]
    shapes += [(rows, hidden), (rows,), (hidden, rows), (hidden,), (hidden,), (hidden,)]
    from packedbert.structure import DenseLayer

    assert plan_layer(DenseLayer(*map(torch.ones, shapes)), 8).heads == ()
