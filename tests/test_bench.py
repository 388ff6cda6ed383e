"""What `bench` and `demo` measure is what they say they measure."""

import pytest
import torch

from packedbert import bench, ops, shortcut
from packedbert.patch import report_of

TINY = bench.STRUCTURES["tiny"]


def logits(model, batch):
    with torch.inference_mode():
        output = model(**batch)
    return torch.stack([output.start_logits, output.end_logits])[:, batch["attention_mask"].bool()]


def test_exactness_measures_the_kernels(monkeypatch):
    """A wrong kernel has to show in both figures; not in one that another path computed."""
    models, batch = bench.build_models(TINY), bench.random_batch(TINY, 3, 9, ragged=True)
    stored = bench.build_stock(TINY, stored=True)
    right = bench.exactness(models.patched, stored, batch)
    assert max(right) < 1e-5
    run, encoder = shortcut.run, ops.encoder
    monkeypatch.setattr(ops, "encoder", lambda *arguments: 1.1 * encoder(*arguments))
    monkeypatch.setattr(shortcut, "run", lambda *arguments: (found := run(*arguments)) and [1.1 * x for x in found])
    wrong = bench.exactness(models.patched, stored, batch)
    assert min(wrong) > 1e-2


def test_stored_rows_that_are_gone_leave_a_constant_which_is_folded():
    stored, narrow = bench.build_stock(TINY, stored=True), bench.build_stock(TINY)
    models, batch = bench.build_models(TINY), bench.random_batch(TINY, 3, 9, ragged=True)
    expected = logits(stored, batch)
    assert (logits(narrow, batch) - expected).abs().max() > 1e-2  # what dropping it would do
    for model in (models.patched, models.eager):
        torch.testing.assert_close(logits(model, batch), expected, atol=2e-6, rtol=1e-5)
    for layer, width in zip(stored.bert.encoder.layer, TINY.ffn_widths, strict=True):
        assert layer.intermediate.dense.weight[width:].eq(0).all()
        assert layer.intermediate.dense.bias[width:].ne(0).all()


def test_packed_eager_has_stock_modules_with_sdpa_and_as_many_parameters():
    models = bench.build_models(TINY)
    assert type(models.eager.bert.encoder).__module__.startswith("transformers.")
    assert models.eager.config._attn_implementation == models.dense.config._attn_implementation == "sdpa"
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts[1] == counts[2] == report_of(models.patched).parameters_after < counts[0]


def test_a_backend_is_used_and_reported():
    assert report_of(bench.build_models(TINY, "reference").patched).backend == "reference"


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before():
    first, batch = bench.build_stock(TINY, 3), bench.random_batch(TINY, 2, 7, ragged=True, seed=5)
    torch.rand(7)
    for one, other in zip(first.state_dict().values(), bench.build_stock(TINY, 3).state_dict().values(), strict=True):
        assert torch.equal(one, other)
    again, different = (bench.random_batch(TINY, 2, 7, ragged=True, seed=seed) for seed in (5, 6))
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert not torch.equal(batch["input_ids"], different["input_ids"])


@pytest.mark.parametrize("seconds", [[2.0], [1.0, 2.0], [1.0, 2.0, 9.0]])
def test_quartiles_stay_within_what_was_measured(seconds):
    low, median, high = bench._quartiles(seconds)
    assert 1e3 * min(seconds) <= low <= median <= high <= 1e3 * max(seconds)


def test_a_race_runs_every_model_on_inputs_that_vary():
    seen = {}

    class Recorder(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            assert torch.is_inference_mode_enabled()
            seen.setdefault(id(self), []).append(input_ids)

    results = bench.race({"a": Recorder(), "b": Recorder()}, TINY, 2, 5, 4)
    assert [(result.model, result.batch, result.length) for result in results] == [("a", 2, 5), ("b", 2, 5)]
    one, other = seen.values()
    assert len(one) == 6  # two to warm up
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    assert len({tuple(x.flatten().tolist()) for x in one}) == 3


def test_the_seed_has_the_published_number_of_parameters():
    """Counted without memory for the weights."""
    structure = bench.SEED
    embeddings = structure.hidden_size * (structure.vocab_size + structure.max_length + 2 + 2)
    head = 2 * (structure.hidden_size + 1)

    def count(width_of):
        total = embeddings + head
        for heads, width in zip(structure.heads, map(width_of, structure.ffn_widths), strict=True):
            inner = heads * 64
            total += 3 * inner * 769 + 768 * (inner + 1) + width * 769 + 768 * (width + 1) + 4 * 768
        return total

    assert count(lambda width: width) == 46_161_559
    assert count(lambda width: structure.intermediate_size) == 93_149_186
    assert tuple(12 - len(gone) for gone in structure.pruned_heads) == structure.heads
