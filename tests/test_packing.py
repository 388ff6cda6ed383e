"""Planning and packing keep the function of the masked model, whatever was pruned."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    COLUMNS_ZERO,
    KEPT,
    KEY_ZERO,
    QUERY_GONE,
    QUERY_KEY_KINDS,
    QUERY_ZERO,
    ROWS_ZERO,
    encoder_of,
    inputs,
    prune,
    prune_dimensions,
    tiny_bert,
    tiny_config,
)

import packedbert
from packedbert.packing import pack_layer
from packedbert.patch import _dense_layer
from packedbert.structure import HEAD_SIZE_STEP, plan_layer

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


@st.composite
def models_with_narrow_heads(draw):
    """Heads whose dimensions are partly zero, what has to be left of each layer, and a batch, all in float64."""
    head_size, heads, layers = draw(st.sampled_from([9, 17, 24])), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 99))
    random = torch.Generator().manual_seed(seed)

    def kinds(needed, others):
        """Of one head: at most so many dimensions that are needed, anywhere."""
        at_most = draw(st.integers(0, head_size))
        kinds = [needed[i % len(needed)] for i in range(at_most)]
        kinds += [others[i % len(others)] for i in range(head_size - at_most)]
        return [kinds[i] for i in torch.randperm(head_size, generator=random)]

    query_key = [[kinds((KEPT, QUERY_ZERO), (QUERY_GONE, KEY_ZERO)) for _ in range(heads)] for _ in range(layers)]
    value = [[kinds((KEPT,), (ROWS_ZERO, COLUMNS_ZERO)) for _ in range(heads)] for _ in range(layers)]
    config = tiny_config(
        hidden_size=head_size * heads, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=3
    )
    model = prune_dimensions(tiny_bert("BertModel", config, seed), query_key, value).double()
    expected = []
    for of_queries, of_values in zip(query_key, value, strict=True):
        kept = tuple(head for head in range(heads) if KEPT in of_values[head])
        needed = [len([k for k in of_queries[head] if k in (KEPT, QUERY_ZERO)]) for head in kept]
        needed += [of_values[head].count(KEPT) for head in kept]
        size = -(-max(needed, default=head_size) // HEAD_SIZE_STEP) * HEAD_SIZE_STEP
        expected.append((kept, size if size < head_size else None))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    return model, expected, inputs(config, lengths, seed=seed)


@given(models_with_narrow_heads())
def test_heads_become_as_narrow_as_is_exact(drawn):
    model, expected, batch = drawn
    outputs = head_outputs(model, batch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packedbert.patch_model(model, backend="reference")
    torch.testing.assert_close(head_outputs(model, batch), outputs, rtol=0, atol=1e-11)
    structure = model.packedbert_report.structure
    assert [(layer.heads, layer.head_size) for layer in structure.layers] == expected

    with torch.no_grad():
        got = model(**batch, output_attentions=True).attentions
    rows = batch["attention_mask"].bool()[:, None, :, None]
    for ours, theirs, (heads, _) in zip(got, attentions, expected, strict=True):
        difference = (ours - theirs[:, list(heads)]).abs() * rows
        assert difference.numel() == 0 or difference.max() < 1e-11

    packedbert.unpatch_model(model)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", QUERY_KEY_KINDS)
def test_which_dimensions_of_queries_and_keys_go(kind):
    """Every head of 24 dimensions has 16 of this kind."""
    config = tiny_config(hidden_size=48, num_attention_heads=2, num_hidden_layers=1)
    heads = [[[KEPT] * 8 + [kind] * 16] * 2]
    values = [[[KEPT] * 8 + [ROWS_ZERO] * 16] * 2]
    model = prune_dimensions(tiny_bert("BertModel", config), heads, values)
    [layer] = packedbert.patch_model(model).packedbert_report.structure.layers
    assert layer.head_size == (8 if kind in (QUERY_GONE, KEY_ZERO) else None)


def test_a_head_that_has_only_halves_of_value_dimensions_goes():
    """Rows that are left meet output columns that are zero, and the other way round."""
    config = tiny_config(num_hidden_layers=1)
    values = [[[ROWS_ZERO] * 4 + [COLUMNS_ZERO] * 4, *[[KEPT] * 8] * 3]]
    model = prune_dimensions(tiny_bert("BertModel", config), [[[KEPT] * 8] * 4], values)
    batch = inputs(config, [5, 3])
    expected = head_outputs(model, batch)
    [layer] = packedbert.patch_model(model).packedbert_report.structure.layers
    assert layer.heads == (1, 2, 3)
    torch.testing.assert_close(head_outputs(model, batch), expected, rtol=0, atol=2e-6)


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
