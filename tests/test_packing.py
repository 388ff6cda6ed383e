"""Planning and packing keep the function of the masked model, whatever was pruned."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import COLUMNS_ZERO, KEPT, ROWS_ZERO, encoder_of, inputs, prune, tiny_bert, tiny_config

import packedbert
from packedbert.packing import pack_layer
from packedbert.patch import _dense_layer
from packedbert.structure import plan_layer

KINDS = st.sampled_from([KEPT, ROWS_ZERO, COLUMNS_ZERO])


def head_outputs(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


@st.composite
def pruned_models(draw):
    """A random architecture, its pruning, and a batch, all in float64."""
    head_size, heads = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    config = tiny_config(
        hidden_size=head_size * heads,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 12)),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5])),
    )
    layers = config.num_hidden_layers
    head_kinds = draw(st.lists(st.lists(KINDS, min_size=heads, max_size=heads), min_size=layers, max_size=layers))
    width = config.intermediate_size
    row_kinds = draw(st.lists(st.lists(KINDS, min_size=width, max_size=width), min_size=layers, max_size=layers))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    seed = draw(st.integers(0, 99))
    model = prune(tiny_bert("BertModel", config, seed), head_kinds, row_kinds).double()
    return model, head_kinds, row_kinds, inputs(config, lengths, seed=seed)


@given(pruned_models())
def test_packed_is_the_masked_model(drawn):
    model, head_kinds, row_kinds, batch = drawn
    expected = head_outputs(model, batch)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packedbert.patch_model(model, backend="reference")
    torch.testing.assert_close(head_outputs(model, batch), expected, rtol=0, atol=1e-11)

    left = model.packedbert_report.structure.layers
    for layer, heads, rows in zip(left, head_kinds, row_kinds, strict=True):
        assert layer.heads == tuple(i for i, kind in enumerate(heads) if kind == KEPT)
        assert layer.ffn_width == rows.count(KEPT)

    packedbert.unpatch_model(model)
    assert model.state_dict().keys() == original.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name]), name


def dense_layer(config, layer=0, seed=0):
    return _dense_layer(encoder_of(tiny_bert("BertModel", config, seed)).layer[layer], "layer", 8, 1e-12)


def test_a_dropped_bias_would_change_the_answer():
    """The constants that packing folds are not small here: a packer that drops them fails this file."""
    config = tiny_config(num_hidden_layers=1)
    kinds = [[ROWS_ZERO] * 4], [[ROWS_ZERO] * 40]
    model = prune(tiny_bert("BertModel", config), *kinds)
    batch = inputs(config, [5, 3])
    expected = head_outputs(model, batch)
    forgetful = copy.deepcopy(model)
    with torch.no_grad():
        forgetful.encoder.layer[0].intermediate.dense.bias.zero_()
        forgetful.encoder.layer[0].attention.self.value.bias.zero_()
    assert (head_outputs(packedbert.patch_model(forgetful), batch) - expected).abs().max() > 0.1
    torch.testing.assert_close(head_outputs(packedbert.patch_model(model), batch), expected, rtol=0, atol=2e-6)


def test_weights_are_copied_and_what_nothing_is_folded_into_keeps_its_bits():
    dense = dense_layer(tiny_config())
    packed = pack_layer(dense, plan_layer(dense, 8), 8, "gelu")
    assert torch.equal(packed.qkv_weight, torch.cat([dense.query_weight, dense.key_weight, dense.value_weight]))
    assert torch.equal(packed.down_weight, dense.down_weight)
    assert torch.equal(packed.down_bias, dense.down_bias)
    assert torch.equal(packed.attention_output_bias, dense.attention_output_bias)
    addresses = {tensor.data_ptr() for tensor in dense}
    assert not addresses & {tensor.data_ptr() for tensor in packed}


def test_negative_zero_and_denormals():
    """-0.0 is zero; the smallest denormal is not."""
    dense = dense_layer(tiny_config())
    up = dense.up_weight.clone()
    up[0], up[1] = -0.0, 0.0
    up[1, 3] = 1e-45
    plan = plan_layer(dense._replace(up_weight=up), 8)
    assert 0 not in plan.ffn_rows
    assert 1 in plan.ffn_rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["query_weight", "value_bias", "down_weight", "output_norm_bias"])
def test_weights_that_are_not_finite_are_refused(field, value):
    dense = dense_layer(tiny_config())
    damaged = getattr(dense, field).clone()
    damaged.view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"{field}: expected finite weights, got 1 NaN or infinite"):
        plan_layer(dense._replace(**{field: damaged}), 8)
