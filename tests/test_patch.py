"""patch_model and unpatch_model on every kind of model, and on everything that they have to refuse."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import transformers
from models import ARCHITECTURES, encoder_of, inputs, prune, some_pruning, tiny_bert, tiny_config
from torch import nn
from torch.nn.utils.prune import identity

import packedbert
from packedbert import dispatch, shortcut
from packedbert.layers import NoNorm
from packedbert.modules import PackedBertModel


def pruned(architecture="BertModel", **config):
    config = tiny_config(**config)
    return prune(tiny_bert(architecture, config), *some_pruning(config))


def run(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options)


def batch_for(model, lengths=(5, 9, 1, 7), length=11):
    batch = inputs(model.config, lengths, length)
    if type(model).__name__ == "BertForMultipleChoice":
        return {name: tensor[None] for name, tensor in batch.items()}
    return batch


def assert_same_on_real_tokens(got, expected, mask, atol=5e-6):
    """Compare all outputs; those with a position for each token only where it is real."""
    # The stock model adds an empty tuple of cross attentions to the attentions that it was asked for.
    expected = {name: value for name, value in expected.items() if not (isinstance(value, tuple) and not value)}
    assert got.keys() == expected.keys()
    mask = mask.bool().flatten(0, -2)
    for name in expected:
        pairs = (
            zip(got[name], expected[name], strict=True)
            if isinstance(expected[name], tuple)
            else [(got[name], expected[name])]
        )
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape, name
            if name == "attentions":
                rows = mask[:, None, :, None].expand_as(theirs)
                torch.testing.assert_close(ours[rows], theirs[rows], rtol=0, atol=atol)
            elif ours.shape[:2] == mask.shape:
                torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=atol)
            else:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------- same answers


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_answers_and_silence(architecture, backend):
    model = pruned(architecture)
    batch = batch_for(model)
    expected = run(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packedbert.patch_model(model, backend=backend) is model
    assert_same_on_real_tokens(run(model, batch), expected, batch["attention_mask"])
    assert isinstance(model, getattr(transformers, architecture))
    assert model.packedbert_report.backend == backend


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("architecture", ["BertModel", "BertForQuestionAnswering"])
def test_hidden_states_and_attentions(architecture, how):
    # A head whose columns are zero still attends in the stock model, but is gone from the packed one: keep all heads.
    model = tiny_bert(architecture)
    model.set_attn_implementation("eager")
    batch, options = batch_for(model), {"output_hidden_states": True, "output_attentions": True}
    expected = run(copy.deepcopy(model), batch, **options)
    packedbert.patch_model(model)
    if how == "config":
        model.config.output_hidden_states = model.config.output_attentions = True
        options = {}
    got = run(model, batch, **options)
    assert len(got.hidden_states) == 3
    assert len(got.attentions) == 2
    assert_same_on_real_tokens(got, expected, batch["attention_mask"])


def test_capture_before_patching_does_not_confuse_it():
    model = pruned()
    batch = batch_for(model)
    before = run(model, batch, output_hidden_states=True)
    packedbert.patch_model(model)
    assert_same_on_real_tokens(run(model, batch, output_hidden_states=True), before, batch["attention_mask"])
    packedbert.unpatch_model(model)
    after = run(model, batch, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, before.hidden_states, strict=True))


def test_selected_hidden_states():
    model = packedbert.patch_model(pruned())
    batch = batch_for(model)
    states = run(model, batch, output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in states] == [False, True, False]


def test_tuple_output():
    model = packedbert.patch_model(pruned("BertForQuestionAnswering"))
    batch = batch_for(model)
    start, end = run(model, batch, return_dict=False)
    torch.testing.assert_close(start, run(model, batch).start_logits)  # there the head is another kernel
    torch.testing.assert_close(end, run(model, batch).end_logits)


@pytest.mark.parametrize("kind", ["3-D", "4-D boolean", "4-D additive"])
def test_masks_per_query_take_the_reference_path(kind):
    model = pruned()
    batch = batch_for(model, (6, 6), 6)
    causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    batch["attention_mask"] = causal if kind == "4-D boolean" else additive
    expected = run(model, batch).last_hidden_state
    packedbert.patch_model(model)
    if kind == "3-D":
        batch["attention_mask"] = causal[:, 0].long()
    torch.testing.assert_close(run(model, batch).last_hidden_state, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("mask", [[[1, 1, 0, 1], [0, 0, 1, 1]], [[0, 1, 1, 1], [1, 0, 0, 0]]])
def test_holes_and_left_padding(mask):
    model = pruned()
    batch = {**inputs(model.config, [4, 4]), "attention_mask": torch.tensor(mask)}
    expected = run(model, batch)
    got = run(packedbert.patch_model(model), batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.last_hidden_state[real], expected.last_hidden_state[real], rtol=0, atol=5e-6)
    assert (got.last_hidden_state[~real] == 0).all()


def test_a_row_without_real_tokens_is_zero():
    model = packedbert.patch_model(pruned())
    batch = inputs(model.config, [4, 0])
    got = run(model, batch).last_hidden_state
    assert (got[1] == 0).all()
    alone = run(model, {name: tensor[:1] for name, tensor in batch.items()}).last_hidden_state
    torch.testing.assert_close(got[:1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_batches_give_empty_results(shape):
    model = packedbert.patch_model(pruned())
    got = run(model, {"input_ids": torch.zeros(shape, dtype=torch.long)})
    assert got.last_hidden_state.shape == (*shape, model.config.hidden_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_work(dtype):
    """Half precision is stored and computed in float32; float64 is computed by PyTorch, which is said."""
    model = pruned().to(dtype)
    batch = batch_for(model)
    real = batch["attention_mask"].bool()
    oracle = run(copy.deepcopy(model).double(), batch).last_hidden_state[real]
    own_error = (run(model, batch).last_hidden_state[real] - oracle).abs().max()
    if dtype == torch.float64:
        with pytest.warns(packedbert.PackedBertWarning, match=f"the model is in {dtype}") as caught:
            packedbert.patch_model(model)
        assert len(caught) == 1
    else:
        packedbert.patch_model(model)
        assert model.packedbert_report.backend == "cpu"
    got = run(model, batch).last_hidden_state
    assert got.dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps * oracle.abs().max()
    assert (got[real] - oracle).abs().max() <= 2 * own_error + rounding


def no_norm(model):
    """What nn_pruning makes of a model: every LayerNorm replaced by a scale and a shift."""

    class NoNorm(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.bias = norm.weight, norm.bias

        def forward(self, x):
            return x * self.weight + self.bias

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            model.set_submodule(name, NoNorm(module))
    return model


@pytest.mark.parametrize("already", [True, False], ids=["NoNorm modules", "stock modules"])
@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM"])
def test_no_norm_everywhere(architecture, already):
    model = pruned(architecture, hidden_act="relu")
    model.config.layer_norm_type = "no_norm"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.mul_(0.3)  # without normalisation the states would grow
    batch = batch_for(model)
    expected = run(no_norm(copy.deepcopy(model)), batch)
    original = {name: type(module) for name, module in model.named_modules()}
    model = packedbert.patch_model(no_norm(model) if already else model)
    assert_same_on_real_tokens(run(model, batch), expected, batch["attention_mask"])
    if not already:
        assert isinstance(
            model.get_submodule("embeddings" if architecture == "BertModel" else "bert.embeddings").LayerNorm, NoNorm
        )
        packedbert.unpatch_model(model)
        assert {name: type(module) for name, module in model.named_modules()} == original


def test_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    folder = tmp_path / "bert"
    bert = pruned(vocab_size=8)
    bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    words = modules.Transformer(str(folder), max_seq_length=16)
    pooling = modules.Pooling(bert.config.hidden_size)
    model = sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu")
    sentences = ["a b c", "c", "b b b a a"]
    expected = model.encode(sentences)
    assert packedbert.patch_model(model) is model
    assert any(isinstance(module, PackedBertModel) for module in model.modules())
    torch.testing.assert_close(torch.tensor(model.encode(sentences)), torch.tensor(expected), rtol=0, atol=5e-6)
    model.save(str(tmp_path / "saved"))
    reloaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(torch.tensor(reloaded.encode(sentences)), torch.tensor(expected), rtol=0, atol=5e-6)


# ------------------------------------------------------------------------------------------ torch's machinery


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("architecture", ["BertModel", "BertForQuestionAnswering"])
def test_compile_without_a_graph_break(architecture, backend):
    torch._dynamo.reset()
    model = packedbert.patch_model(pruned(architecture), backend=backend)
    compiled = torch.compile(model, fullgraph=True)
    for lengths, length in (((5, 9), 11), ((3, 8, 2), 8)):
        batch = batch_for(model, lengths, length)
        assert_same_on_real_tokens(run(compiled, batch), run(model, batch), batch["attention_mask"])
    with torch.no_grad():
        encoder_of(model).layer[0].up.weight.mul_(3)
    # The compiled graph, too, has to notice that a weight changed.
    assert_same_on_real_tokens(run(compiled, batch), run(model, batch), batch["attention_mask"])


def test_compiled_hidden_states():
    torch._dynamo.reset()
    model = packedbert.patch_model(pruned())
    batch = batch_for(model)
    got = run(torch.compile(model, fullgraph=True), batch, output_hidden_states=True)
    assert_same_on_real_tokens(got, run(model, batch, output_hidden_states=True), batch["attention_mask"])


def test_gradients_take_the_differentiable_path():
    model = pruned()
    embedded = torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    gradients = []
    for patched in (False, True):
        x = embedded.clone().requires_grad_()
        if patched:
            packedbert.patch_model(model)
        model(inputs_embeds=x, attention_mask=mask).last_hidden_state[mask.bool()].square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_a_plain_forward_asks_for_no_gradient():
    model = packedbert.patch_model(pruned())
    assert not model(**batch_for(model)).last_hidden_state.requires_grad


def copies(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield "deepcopy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))
    yield "torch.save", torch.load(buffer, weights_only=False)


def test_copies_work_and_are_independent():
    model = pruned("BertForQuestionAnswering")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packedbert.patch_model(model)
    batch = batch_for(model)
    expected = run(model, batch).start_logits
    for how, other in copies(model):
        torch.testing.assert_close(run(other, batch).start_logits, expected, rtol=0, atol=1e-6, msg=how)
        with torch.no_grad():
            encoder_of(other).layer[0].down.weight.zero_()
        assert not torch.allclose(run(other, batch).start_logits, expected), how
        torch.testing.assert_close(run(model, batch).start_logits, expected, rtol=0, atol=1e-6, msg=how)
        packedbert.unpatch_model(other)
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items()), how


def test_state_dict_goes_in_and_out():
    model, other = packedbert.patch_model(pruned()), packedbert.patch_model(pruned())
    batch = batch_for(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    assert not torch.allclose(run(other, batch).last_hidden_state, run(model, batch).last_hidden_state)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        run(other, batch).last_hidden_state, run(model, batch).last_hidden_state, rtol=0, atol=1e-6
    )
    with pytest.raises(RuntimeError, match=r"encoder\.layer\.0\.attention\.self\.query\.weight"):
        other.load_state_dict(pruned().state_dict())


def test_conversion_of_a_patched_model():
    model = packedbert.patch_model(pruned())
    batch = batch_for(model)
    expected = run(model, batch).last_hidden_state
    assert run(model.double(), batch).last_hidden_state.dtype == torch.float64
    torch.testing.assert_close(run(model.float(), batch).last_hidden_state, expected, rtol=0, atol=1e-6)
    packedbert.unpatch_model(model.double())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_threads_share_a_model():
    model = packedbert.patch_model(pruned())
    batches = [inputs(model.config, [n, 11 - n], 11, seed=n) for n in range(1, 9)]
    expected = [run(model, batch).last_hidden_state for batch in batches]
    encoder_of(model).clear_cache()
    results = [None] * len(batches)

    def work(index):
        for _ in range(20):
            results[index] = run(model, batches[index]).last_hidden_state

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------- leaving things as they were


def test_unpatch_restores_everything():
    config = tiny_config()
    model = prune(tiny_bert("BertForQuestionAnswering", config), *some_pruning(config)).train()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    shared_config = model.config
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, identity = list(model.named_modules()), {name: id(p) for name, p in model.named_parameters()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    packedbert.patch_model(model)
    assert not any(module.training for module in model.modules())
    assert packedbert.unpatch_model(model) is model
    assert [(name, module) for name, module in model.named_modules()] == modules
    assert {name: id(p) for name, p in model.named_parameters()} == identity
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == gradients
    assert model.config is shared_config
    assert model.bert.config is shared_config
    assert all(module.training for module in model.modules())
    assert type(model.bert) is transformers.BertModel
    assert not hasattr(model, "packedbert_report")
    packedbert.patch_model(model)  # and again


def test_models_that_share_a_config_do_not_notice():
    config = tiny_config()
    one, other = tiny_bert("BertModel", config), tiny_bert("BertForQuestionAnswering", config)
    assert one.config is other.config
    before = config.to_dict()
    batch = batch_for(one)
    expected = run(other, batch).start_logits
    packedbert.patch_model(one)
    assert config.to_dict() == before
    assert other.config is config
    assert torch.equal(run(other, batch).start_logits, expected)


def test_training_is_refused_and_harmless():
    model = pruned("BertForSequenceClassification")
    packedbert.patch_model(model)
    batch = batch_for(model)
    expected = run(model, batch).logits
    with pytest.raises(RuntimeError, match="unpatch_model"):
        model.train()
    torch.testing.assert_close(run(model, batch).logits, expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ bad input


def assert_unharmed(model, batch, expected, state):
    torch.testing.assert_close(run(model, batch).last_hidden_state, expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, PackedBertModel) for module in model.modules())


def damage_nan(model):
    model.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")


def damage_width(model):
    model.encoder.layer[1].output.dense = nn.Linear(39, 32)


def damage_linear(model):
    class Adapter(nn.Linear):
        pass

    model.encoder.layer[1].intermediate.dense = Adapter(32, 40)


def damage_bias(model):
    model.encoder.layer[0].attention.self.key = nn.Linear(32, 32, bias=False)


def damage_eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 1e-3


def damage_dtype(model):
    model.encoder.layer[0].output.half()


def damage_activation(model):
    model.config.hidden_act = "silu"


def damage_pruned_heads(model):
    model.config.pruned_heads = {"7": [0]}


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (damage_nan, ValueError, r"encoder\.layer\.1: down_weight: expected finite weights, got 1 NaN"),
        (damage_width, ValueError, r"encoder\.layer\.1: down_weight: expected \[32, 40\] .*, got \[32, 39\]"),
        (damage_linear, TypeError, r"encoder\.layer\.1: expected nn\.Linear with a bias as up, got .*Adapter"),
        (damage_bias, TypeError, r"encoder\.layer\.0: expected nn\.Linear with a bias as key"),
        (damage_eps, ValueError, r"output_norm: expected eps 1e-12"),
        (damage_dtype, ValueError, r"encoder\.layer\.0: down_weight: expected torch\.float32 on cpu"),
        (damage_activation, ValueError, r"config\.hidden_act: expected one of relu, gelu, .*, got 'silu'"),
        (damage_pruned_heads, ValueError, r"config\.pruned_heads: expected layers 0 to 1, got 7"),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused_unharmed(damage, error, text):
    model = tiny_bert()
    damage(model)
    state, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=text):
        packedbert.patch_model(model)
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("options", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
def test_decoders_are_refused(options):
    with pytest.raises(ValueError, match="expected a BERT encoder, got a decoder"):
        packedbert.patch_model(tiny_bert("BertModel", tiny_config(**options)))


def test_unknown_models_are_named():
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(**tiny_config().to_dict() | {"model_type": "roberta"})
    )
    with pytest.raises(TypeError, match=r"expected a model with a transformers\.BertModel in it, got a RobertaModel"):
        packedbert.patch_model(roberta)
    with pytest.raises(TypeError, match="got a Linear"):
        packedbert.patch_model(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module with a BERT in it, got str"):
        packedbert.patch_model("bert-base-uncased")


def test_subclasses_with_their_own_forward_are_refused():
    class MyBert(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return None

    with pytest.raises(TypeError, match="MyBert, whose forward may differ"):
        packedbert.patch_model(MyBert(tiny_config()))


def test_patching_twice_is_refused():
    model = packedbert.patch_model(pruned())
    with pytest.raises(ValueError, match="packed already; unpatch_model"):
        packedbert.patch_model(model)


def test_unpatching_what_cannot_be_unpatched():
    with pytest.raises(ValueError, match="this one is not patched"):
        packedbert.unpatch_model(pruned())
    model = packedbert.patch_model(pruned(), keep_original=False)
    with pytest.raises(ValueError, match="keep_original=False"):
        packedbert.unpatch_model(model)


def test_impossible_choices(monkeypatch):
    model = pruned().double()
    batch = batch_for(model)
    expected, state = run(model, batch).last_hidden_state, copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"backend 'cpu' was asked for, but the model is in torch\.float64"):
        packedbert.patch_model(model, backend="cpu")
    with pytest.raises(ValueError, match=r"backend: expected one of auto, cpu, cuda, triton, reference, got 'cuda:0'"):
        packedbert.patch_model(model, backend="cuda:0")
    with pytest.raises(TypeError, match=r"expected backend, precision, .*, got bakend"):
        packedbert.patch_model(model, bakend="cpu")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "tpu")
    with pytest.raises(ValueError, match="PACKEDBERT_BACKEND: expected one of"):
        packedbert.patch_model(model)
    assert_unharmed(model, batch, expected, state)


def test_the_environment_decides_for_auto(monkeypatch):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "reference")
    assert packedbert.patch_model(pruned()).packedbert_report.backend == "reference"
    assert packedbert.patch_model(pruned(), backend="cpu").packedbert_report.backend == "cpu"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"attention_mask": torch.ones(2, 5)}, ValueError, r"attention_mask: expected \[2, 4\], .*, got \[2, 5\]"),
        ({"attention_mask": torch.ones(4)}, ValueError, r"attention_mask: expected \[2, 4\], .*, got \[4\]"),
        ({"attention_mask": torch.ones(2, 4, 4, 4)}, ValueError, r"attention_mask: .*, got \[2, 4, 4, 4\]"),
        ({"input_ids": torch.full((2, 4), 61)}, IndexError, r"input_ids: expected 0 to 60, got 61 to 61"),
        ({"input_ids": torch.full((2, 4), -1)}, IndexError, r"input_ids: expected 0 to 60, got -1 to -1"),
        ({"token_type_ids": torch.full((2, 4), 2)}, IndexError, r"token_type_ids: expected 0 to 1, got 2"),
        ({"position_ids": torch.full((1, 4), 24)}, IndexError, r"position_ids: expected 0 to 23, got 24"),
        (
            {"input_ids": torch.zeros(4, dtype=torch.long)},
            ValueError,
            r"input_ids: expected \[batch, length\], got \[4\]",
        ),
        ({"inputs_embeds": torch.zeros(2, 4, 32)}, ValueError, "exactly one of input_ids and inputs_embeds, got both"),
        ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds, got neither"),
        ({"encoder_hidden_states": torch.zeros(2, 4, 32)}, ValueError, "got also encoder_hidden_states"),
        ({"cu_seq_lens_q": torch.zeros(3)}, ValueError, "got also cu_seq_lens_q"),
    ],
)
def test_bad_inputs(change, error, text):
    model = packedbert.patch_model(pruned())
    batch = inputs(model.config, [4, 2])
    expected = run(model, batch).last_hidden_state
    with pytest.raises(error, match=text):
        run(model, {**batch, "position_ids": None, **change})
    torch.testing.assert_close(run(model, batch).last_hidden_state, expected)


def test_too_long():
    model = packedbert.patch_model(pruned())
    with pytest.raises(ValueError, match=r"expected at most 24 tokens .*, got 25"):
        run(model, inputs(model.config, [25]))


def test_hooks_of_the_user_are_not_lost_silently():
    model = pruned()
    model.encoder.layer[0].register_forward_hook(lambda *args: None)
    with pytest.warns(packedbert.PackedBertWarning, match=r"forward hooks on encoder\.layer\.0"):
        packedbert.patch_model(model)


def test_the_report_prints():
    model = packedbert.patch_model(pruned())
    report = model.packedbert_report
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert "parameters stored" in str(report)
    assert str(report.layers[0].ffn_width) in str(report)
    assert report.heads_removed == 8 - sum(len(layer.heads) for layer in report.layers)


# ------------------------------------------------------------------------------------------------- embeddings


def hooked(model):
    calls = []
    model.bert.embeddings.LayerNorm.register_forward_hook(lambda *_: calls.append("hook"))
    return calls


def overridden(model):
    calls, norm = [], model.bert.embeddings.LayerNorm
    norm.forward = lambda x: calls.append("hook") or type(norm).forward(norm, x)
    return calls


class Same(torch.nn.Module):
    def forward(self, weight):
        return weight.clone()


def parametrized(model):
    torch.nn.utils.parametrize.register_parametrization(model.bert.embeddings.word_embeddings, "weight", Same())


def with_max_norm(model):
    model.bert.embeddings.word_embeddings.max_norm = 1e9


def pruned_words(model):
    identity(model.bert.embeddings.word_embeddings, "weight")


@pytest.mark.parametrize(
    ("change", "native"),
    [
        (None, True),
        (lambda model: model.double().float() and None, True),
        (hooked, False),
        (overridden, False),
        (parametrized, False),
        (with_max_norm, False),
        (pruned_words, False),
    ],
    ids=["plain", "converted", "a hook", "another forward", "a parametrization", "max_norm", "prune"],
)
def test_embeddings_are_one_op_where_nothing_else_is_asked_for(change, native, monkeypatch):
    calls = []
    embed, whole = packedbert.ops.embed, shortcut.run
    monkeypatch.setattr(packedbert.ops, "embed", lambda *a: calls.append("op") or embed(*a))

    def noted(*arguments):  # or part of one op
        result = whole(*arguments)
        calls.extend(["op"] if result is not None else [])
        return result

    monkeypatch.setattr(shortcut, "run", noted)
    model = pruned("BertForQuestionAnswering")
    batch = batch_for(model)
    expected = run(model, batch)
    model = packedbert.patch_model(model)
    seen = change(model) if change else None
    assert_same_on_real_tokens(run(model, batch), expected, batch["attention_mask"])
    on_cpu = packedbert.dispatch.resolve("auto", torch.device("cpu"), torch.float32) == "cpu"
    assert calls == (["op"] if native and on_cpu else [])
    assert seen in (None, ["hook"])


def test_embeddings_without_a_bias():
    model = pruned("BertForQuestionAnswering")
    batch = batch_for(model)
    model.bert.embeddings.LayerNorm.bias = None
    expected = run(model, batch)
    assert_same_on_real_tokens(run(packedbert.patch_model(model), batch), expected, batch["attention_mask"])
