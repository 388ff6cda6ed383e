"""release_weights: the matrices in the native kernels' layout only, and nothing that a user sees is different."""

import copy
import pickle

import pytest
import torch
from models import inputs, prune, some_pruning, tiny_bert, tiny_config

import packedbert
from packedbert import dispatch
from packedbert.layers import PrepackedLinear

pytestmark = pytest.mark.skipif(
    dispatch.resolve("auto", torch.device("cpu"), torch.float32) != "cpu",
    reason="nothing is released where the native kernels do not run",
)


def pruned():
    config = tiny_config()
    return prune(tiny_bert("BertForQuestionAnswering", config), *some_pruning(config))


@pytest.fixture
def kept():
    return packedbert.patch_model(pruned())


@pytest.fixture
def released():
    return packedbert.patch_model(pruned(), release_weights=True)


def batch_of(model):
    return inputs(model.config, (5, 9, 1, 7), 11)


def logits(model, **options):
    with torch.no_grad():
        output = model(**batch_of(model), **options)
    return torch.stack([output.start_logits, output.end_logits])


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_same_bits_and_half_the_memory(kept, released):
    assert torch.equal(logits(released), logits(kept))
    assert_same_state(released, kept)
    matrices = [module for module in released.modules() if isinstance(module, PrepackedLinear)]
    assert len(matrices) == 4 * released.config.num_hidden_layers
    # Nothing else holds them: the cache is empty, and no canonical parameter is left.
    encoder = released.bert.encoder
    assert not encoder.cache._entries
    assert all(parameter.dim() != 2 for parameter in encoder.parameters())
    assert len({matrix.weight.untyped_storage().data_ptr() for matrix in matrices}) == 1  # side by side


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_released_too(released, copier):
    twin = copier(released)
    assert torch.equal(logits(twin), logits(released))
    assert any(isinstance(module, PrepackedLinear) for module in twin.modules())


def test_load_state_dict_packs(kept, released):
    changed = {name: tensor * 1.01 for name, tensor in kept.state_dict().items()}
    before = logits(released)
    kept.load_state_dict(changed)
    released.load_state_dict(changed)
    assert torch.equal(logits(released), logits(kept))
    assert not torch.equal(logits(released), before)
    name = "bert.encoder.layer.0.up.weight"
    assert changed[name].dim() == 2  # the caller's own dictionary is left alone
    with pytest.raises(RuntimeError, match="size mismatch"):
        released.load_state_dict({**changed, name: torch.zeros(500, changed[name].shape[1])})


def test_saved_and_loaded(released, kept, tmp_path):
    released.save_pretrained(tmp_path)
    config = packedbert.PackedBertConfig(release_weights=True)
    for again in (packedbert.load(tmp_path), packedbert.load(tmp_path, config=config)):
        assert torch.equal(logits(again), logits(kept))
        assert_same_state(again, kept)
    assert any(isinstance(module, PrepackedLinear) for module in again.modules())


def test_a_checkpoint_that_is_not_packed_yet(kept, tmp_path):
    pruned().save_pretrained(tmp_path)
    model = packedbert.load(tmp_path, config=packedbert.PackedBertConfig(release_weights=True))
    assert torch.equal(logits(model), logits(kept))
    assert any(isinstance(module, PrepackedLinear) for module in model.modules())


def test_paths_that_want_canonical_weights(kept, released):
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        ours, expected = (model(**batch_of(model), **options) for model in (released, kept))
    for name in ("hidden_states", "attentions"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], expected[name], strict=True))
    torch.testing.assert_close(logits(released.double()), logits(kept.double()), rtol=0, atol=0)


def test_unpatch_brings_the_original_back(released):
    assert_same_state(packedbert.unpatch_model(released), pruned())


def test_the_reference_backend_releases_nothing():
    model = packedbert.patch_model(pruned(), backend="reference", release_weights=True)
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())


def test_compiled(released):
    expected = logits(released)
    compiled = torch.compile(released, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), expected)  # eagerly the head is another kernel, and the rest the same:
    with torch.no_grad():
        states = torch.compile(released.bert, fullgraph=True, backend="eager")(**batch_of(released)).last_hidden_state
        assert torch.equal(states, released.bert(**batch_of(released)).last_hidden_state)
