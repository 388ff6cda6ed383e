"""The one native call of a whole model: taken where nothing forbids it, and never where it would miss something."""

import contextlib
import copy
import dataclasses
import gc
import inspect
import io
import pickle
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
from models import inputs, prune, some_pruning, tiny_bert, tiny_config
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.nn.utils.prune import identity
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

import packedbert
from packedbert import dispatch, shortcut
from packedbert.modules import make_output
from packedbert.shortcut import Shortcut

pytestmark = pytest.mark.skipif(dispatch.cpu_isa() in ("none", "scalar"), reason="needs a native kernel that is chosen")


def packed(precision="fp32"):
    config = tiny_config()
    return packedbert.patch_model(prune(tiny_bert("BertModel", config), *some_pruning(config)), precision=precision)


@pytest.fixture
def taken(monkeypatch):
    """The shortcuts that were taken."""
    calls, run = [], shortcut.run

    def noted(model, *batch):
        result = run(model, *batch)
        if result is not None:
            calls.append(model._shortcut)
        return result

    monkeypatch.setattr(shortcut, "run", noted)
    return calls


def run(model, batch, **options):
    with torch.inference_mode():
        return model(**batch, **options).last_hidden_state


@contextlib.contextmanager
def no_shortcuts(*models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shortcut, "of", lambda *_: None)
        for model in models:
            model._shortcut = None
        yield


def by_modules(model, batch):
    """The same without a shortcut, and without anything that an earlier call left."""
    with no_shortcuts(model):
        model.encoder.clear_cache()
        return run(model, batch)


# ------------------------------------------------------------------------------------------------ it is seen


def replace(module, name, factor=1.5):
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * factor, requires_grad=False))


def other_norm(model):
    model.embeddings.LayerNorm = copy.deepcopy(model.embeddings.LayerNorm)
    model.embeddings.LayerNorm.weight.data.mul_(2)


def other_table(model):
    model.embeddings.word_embeddings = nn.Embedding(*model.embeddings.word_embeddings.weight.shape)


def other_embeddings(model):
    model.embeddings = copy.deepcopy(model.embeddings)
    model.embeddings.LayerNorm.bias.data.add_(1)


def other_activation(model):
    model.encoder.structure = dataclasses.replace(model.encoder.structure, activation="relu")


def other_encoder(model):
    model.encoder = packed().encoder
    model.encoder.layer[0].up.bias.add_(1)


def other_layer(model):
    model.encoder.layer[0] = copy.deepcopy(model.encoder.layer[0])
    model.encoder.layer[0].up.bias.add_(1)


def other_memory(parameter):
    parameter.data = parameter.data * 1.5


def swapped(parameter):
    torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.5, requires_grad=False))


#: Changes after which one native call still is the answer.
CHANGES = {
    "a word": lambda model: model.embeddings.word_embeddings.weight.data.mul_(2),
    "another table": other_table,
    "a replaced table": lambda model: replace(model.embeddings.position_embeddings, "weight"),
    "a table's memory": lambda model: other_memory(model.embeddings.token_type_embeddings.weight),
    "another norm": other_norm,
    "eps": lambda model: setattr(model.embeddings.LayerNorm, "eps", 0.5),
    "other embeddings": other_embeddings,
    "another encoder": other_encoder,
    "another activation": other_activation,
    "another layer": other_layer,
    "a matrix in place": lambda model: model.encoder.layer[0].up.weight.mul_(1.5),
    "a replaced matrix": lambda model: replace(model.encoder.layer[0].down, "weight"),
    "a matrix's memory": lambda model: other_memory(model.encoder.layer[0].qkv.weight),
    "a swapped matrix": lambda model: swapped(model.encoder.layer[0].qkv.weight),
    "a bias in place": lambda model: model.encoder.layer[1].output_norm.bias.add_(1),
    "a replaced bias": lambda model: replace(model.encoder.layer[1].output_norm, "bias", -1),
    "another checkpoint": lambda model: model.load_state_dict(
        {name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change, taken):
    model = packed()
    batch = inputs(model.config, [5, 9, 1], 11)
    before = run(model, batch)
    assert torch.equal(run(model, batch), before)
    assert len(taken) == 2
    assert taken[0] is taken[1]
    change(model)
    after = run(model, batch)
    assert not torch.equal(after, before)
    assert len(taken) == 3
    read_in_place = change in (CHANGES["a word"], CHANGES["a bias in place"])
    assert (taken[2] is taken[1]) == read_in_place
    assert torch.equal(after, by_modules(model, batch))


def hooked(name, register="register_forward_hook"):
    def change(model, calls):
        getattr(model.get_submodule(name), register)(lambda *_: calls.append("hook"))

    return change


def with_other_hooks(name):
    def change(model, calls):
        module = model.get_submodule(name)
        module._forward_hooks = OrderedDict()  # as people do to remove all of them
        module.register_forward_hook(lambda *_: calls.append("hook"))

    return change


def overridden(name):
    def change(model, calls):
        module = model.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args, **kwargs: calls.append("hook") or forward(*args, **kwargs)

    return change


def of_another_class(name):
    def change(model, calls):
        module = model.get_submodule(name)
        kind = type(module)
        forward = lambda self, *args, **kwargs: calls.append("hook") or kind.forward(self, *args, **kwargs)  # noqa: E731
        module.__class__ = type("Other", (kind,), {"forward": forward})

    return change


class Doubled(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, weight):
        self.calls.append("hook")
        return 2 * weight


def parametrized(model, calls):
    parametrize.register_parametrization(model.embeddings.word_embeddings, "weight", Doubled(calls), unsafe=True)


def pruned_by_torch(model, calls):
    identity(model.embeddings.word_embeddings, "weight")  # a forward pre-hook
    calls.append("hook")


def with_max_norm(model, calls):
    model.embeddings.word_embeddings.max_norm = 1e9
    calls.append("hook")


@pytest.mark.parametrize("established", [True, False], ids=["afterwards", "from the start"])
@pytest.mark.parametrize(
    "change",
    [
        *(hooked(name) for name in ("embeddings", "embeddings.LayerNorm", "encoder")),
        hooked("encoder", "register_forward_pre_hook"),
        *(with_other_hooks(name) for name in ("embeddings", "embeddings.word_embeddings", "encoder")),
        *(overridden(name) for name in ("embeddings", "embeddings.word_embeddings", "encoder")),
        *(of_another_class(name) for name in ("embeddings", "embeddings.LayerNorm", "encoder")),
        *(parametrized, pruned_by_torch, with_max_norm),
    ],
)
def test_whoever_wants_the_modules_gets_them(change, established, taken):
    model, calls = packed(), []
    batch = inputs(model.config, [5, 9, 1], 11)
    if established:
        run(model, batch)
        taken.clear()
    change(model, calls)
    got = run(model, batch)
    assert calls
    assert not taken
    assert torch.equal(got, by_modules(model, batch))


def test_global_hooks(taken):
    model, calls = packed(), []
    batch = inputs(model.config, [5, 9], 11)
    expected = run(model, batch)
    with nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module))):
        torch.testing.assert_close(run(model, batch), expected)
    assert nn.LayerNorm in calls
    assert len(taken) == 1
    assert torch.equal(run(model, batch), expected)
    assert len(taken) == 2


def test_models_that_share_an_encoder(taken):
    one, other = packed(), packed()
    other.encoder = one.encoder
    other.embeddings.word_embeddings.weight.data.mul_(2)
    batch = inputs(one.config, [5, 9], 11)
    for _ in range(2):
        results = [run(model, batch) for model in (one, other)]
        assert not torch.equal(*results)
    assert len(taken) == 4
    assert torch.equal(results[0], by_modules(one, batch))
    assert torch.equal(results[1], by_modules(other, batch))


def test_another_backend(taken, monkeypatch):
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    expected = run(model, batch)
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "reference")
    torch.testing.assert_close(run(model, batch), expected)
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE)
    isa = dispatch.cpu_isa()
    dispatch.NATIVE.set_isa("scalar")  # which `auto` doesn't choose
    try:
        torch.testing.assert_close(run(model, batch), expected)
    finally:
        dispatch.NATIVE.set_isa(isa)
    assert len(taken) == 1
    model.encoder.backend = "reference"
    torch.testing.assert_close(run(model, batch), expected)
    model.encoder.backend = "auto"
    assert len(taken) == 1
    model.half()
    assert run(model, batch).dtype == torch.float16
    model.float()
    run(model, batch)
    assert len(taken) == 2


# ----------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("precision", ["fp32", "int8", "bf16"])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.int64, torch.int32, torch.float32, torch.uint8])
@pytest.mark.parametrize("types", [True, False])
def test_masks_and_precisions(precision, mask, types, taken):
    model = packed(precision)
    batch = inputs(model.config, [5, 9, 1], 11)
    batch["attention_mask"] = batch["attention_mask"].to(mask) if mask is not None else None
    if not types:
        del batch["token_type_ids"]
    got = run(model, batch)
    assert len(taken) == (mask is not torch.uint8)  # which is rare: the modules know what to do
    assert torch.equal(got, by_modules(model, batch))
    strided = {name: t if t is None else t.repeat_interleave(2, 1)[:, ::2] for name, t in batch.items()}
    assert torch.equal(run(model, strided), got)


def test_what_it_is_not_for(taken):
    model = packed()
    batch = inputs(model.config, [5, 9, 1], 11)
    expected = run(model, batch)
    taken.clear()
    ids = batch["input_ids"]
    square = batch["attention_mask"][:, None, :].expand(-1, 11, -1)
    other = [
        {"position_ids": torch.arange(11)[None]},
        {"input_ids": None, "inputs_embeds": model.embeddings.word_embeddings(ids).detach()},
        {"input_ids": ids.int()},
        {"attention_mask": square},
        {"output_hidden_states": True},
    ]
    real = batch["attention_mask"].bool()
    for change in other:
        torch.testing.assert_close(run(model, {**batch, **change})[real], expected[real])
    torch.testing.assert_close(model(**batch).last_hidden_state[real], expected[real])  # where gradients are on
    assert not taken
    for name in ("input_ids", "token_type_ids"):
        with pytest.raises(IndexError, match=rf"{name}: expected 0 to \d+, got 0 to 999"):
            run(
                model,
                {**batch, name: torch.tensor([[0, 999]]), "attention_mask": None}
                | ({"token_type_ids": None} if name == "input_ids" else {"input_ids": torch.tensor([[0, 1]])}),
            )
    assert run(model, inputs(model.config, [0], 0) | {"attention_mask": None}).shape == (1, 0, 32)


def test_embeddings_are_one_op_on_the_way_through_the_modules(taken, monkeypatch):
    calls, embed = [], packedbert.ops.embed
    monkeypatch.setattr(packedbert.ops, "embed", lambda *arguments: calls.append("op") or embed(*arguments))
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    run(model, batch, output_hidden_states=True)
    run(model, batch, output_hidden_states=True, position_ids=torch.arange(11)[None])
    with_max_norm(model, calls)
    run(model, batch, output_hidden_states=True)
    assert calls == ["op", "hook"]
    assert not taken


def test_mapped_and_swapped_parameters(taken):
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    expected = run(model, batch)
    states = {name: tensor * 1.5 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    with torch.inference_mode():
        other = torch.func.functional_call(model, states, kwargs=batch).last_hidden_state
    assert not torch.equal(other, expected)
    assert torch.equal(run(model, batch), expected)
    taken.clear()
    ids = batch["input_ids"]
    with torch.no_grad():
        mapped = torch.vmap(lambda row: model(input_ids=row[None]).last_hidden_state[0])(ids)
    assert not taken
    torch.testing.assert_close(mapped, run(model, {"input_ids": ids}))


def test_inputs_elsewhere_are_not_for_the_cpu(taken):
    model = packed()
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    for name, tensor in batch.items():
        with contextlib.suppress(RuntimeError):  # what PyTorch says, if it does
            run(model, {**batch, name: tensor.to("meta")})
    assert not taken


def test_copies_are_their_own(taken):
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    expected = run(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for one in copies:
        assert one._shortcut is None
        assert torch.equal(run(one, batch), expected)
        one.encoder.layer[0].up.weight.mul_(2)
        assert not torch.equal(run(one, batch), expected)
    assert torch.equal(run(model, batch), expected)
    assert len({id(shortcut) for shortcut in taken}) == 1 + 2 * len(copies)


def test_callers_at_once():
    model = packed()
    batches = [inputs(model.config, [5, 9, n], 11, seed=n) for n in range(1, 9)]
    expected = [by_modules(model, batch) for batch in batches]
    model.encoder.clear_cache()
    wrong = []

    def call(turn):
        for index in range(40):
            at = (index + turn) % len(batches)
            if not torch.equal(run(model, batches[at]), expected[at]):
                wrong.append(at)
            if index % 10 == turn:
                model.encoder.clear_cache()

    threads = [threading.Thread(target=call, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_outlives_the_model():
    model = packed()
    run(model, inputs(model.config, [5]))
    memory = weakref.ref(model), weakref.ref(model.encoder.cache.prepared)
    gc.disable()  # no cycle of references leaves hundreds of megabytes to the garbage collector
    try:
        model.encoder.clear_cache()
        assert memory[1]() is None
        del model
        assert memory[0]() is None
        for make in (packed, answering):  # what it holds goes with it
            model = make()
            with torch.inference_mode():
                model(**inputs(model.config, [5]))
            assert model._shortcut is not None
            weights = [weakref.ref(weight) for weight in model.parameters()]
            del model
            assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_a_cleared_cache_is_cleared_whoever_holds_what_was_in_it():
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    before = run(model, batch)
    held = model.encoder.cache.prepared  # as the traceback of an error does, or another thread's call
    model.encoder.layer[0].up.weight.data.mul_(2)  # which PyTorch does not count
    assert torch.equal(run(model, batch), before)
    model.encoder.clear_cache()
    after = run(model, batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, by_modules(model, batch))
    assert held is not model.encoder.cache.prepared
    run(model, batch)
    model.encoder.layer[0].up.weight.data.mul_(2)
    model.encoder.clear_cache()
    model(**batch)  # by the modules, since gradients are on: it fills the cache anew
    assert torch.equal(run(model, batch), by_modules(model, batch))


def test_a_change_while_it_is_made(taken, monkeypatch):
    """As another thread makes it, during the packing of a first forward."""
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    prepare = type(model.encoder).prepared

    def prepared(self):
        result = prepare(self)
        replace(self.layer[0].up, "weight")
        replace(model.embeddings.word_embeddings, "weight")
        return result

    monkeypatch.setattr(type(model.encoder), "prepared", prepared)
    run(model, batch)
    monkeypatch.undo()
    assert torch.equal(run(model, batch), by_modules(model, batch))


def test_a_replica_is_its_own(taken):
    """torch.nn.parallel.replicate copies a module's attributes, the shortcut among them."""
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    expected = run(model, batch)
    replica = model._replicate_for_data_parallel()
    replica.embeddings = copy.deepcopy(model.embeddings)
    replica.embeddings.LayerNorm.bias.data.add_(1)
    assert not torch.equal(run(replica, batch), expected)
    assert torch.equal(run(model, batch), expected)


def test_unpatching_ends_it():
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    run(model, batch)
    packedbert.unpatch_model(model)
    assert "_shortcut" not in vars(model)
    run(model, batch)


def test_bert_prepared_says_what_does_not_fit():
    model = packed()
    batch = inputs(model.config, [5, 9], 11)
    run(model, batch)
    ids, key, op = batch["input_ids"], model._shortcut.key, torch.ops.packedbert.bert_prepared
    with pytest.raises(RuntimeError, match=r"bert_prepared: attention_mask: expected bool, int64, int32 or float32"):
        op(ids, None, torch.ones(2, 11, dtype=torch.float64), key)
    with pytest.raises(RuntimeError, match=r"bert_prepared: attention_mask: expected \[2, 11\] or None, got \[2, 10\]"):
        op(ids, None, torch.ones(2, 10, dtype=torch.bool), key)
    with pytest.raises(RuntimeError, match=r"bert_prepared: input_ids: expected at most 24 positions, got 25"):
        op(torch.zeros(1, 25, dtype=torch.int64), None, None, key)
    with pytest.raises(RuntimeError, match=r"bert_prepared: key: expected one of prepare_bert, .*, got 0"):
        op(ids, None, None, 0)
    model.encoder.clear_cache()
    gc.collect()
    with pytest.raises(RuntimeError, match=r"bert_prepared: key: expected one of prepare_bert, of an encoder that is"):
        op(ids, None, None, key)


# ---------------------------------------------------------------------------------------------------- heads


def answering(precision="fp32", backend="auto", **changes):
    config = tiny_config(**changes)
    model = prune(tiny_bert("BertForQuestionAnswering", config), *some_pruning(config))
    return packedbert.patch_model(model, precision=precision, backend=backend)


def answers(model, batch, **options):
    with torch.inference_mode():
        output = model(**batch, **options)
    return torch.stack([output.start_logits, output.end_logits])


def answers_by_modules(model, batch):
    with no_shortcuts(model, model.bert):
        return answers(model, batch)


@pytest.mark.parametrize("hidden", [4, 20, 36, 132])  # with and without whole vectors, and four of them
def test_answers_are_those_of_the_modules(isa, hidden, taken):
    """The error against float64 is at most twice that of PyTorch's own layer, plus rounding."""
    model = answering(backend="cpu", hidden_size=hidden)  # `auto` does not choose the scalar kernels
    batch = inputs(model.config, [5, 9, 1], 11)
    got = answers(model, batch)
    assert len(taken) == 1
    states = run(model.bert, batch)
    head = model.qa_outputs
    exact = (states.double() @ head.weight.double().t() + head.bias.double()).permute(2, 0, 1)
    scale = (states.abs().double() @ head.weight.abs().double().t()).amax() + head.bias.abs().amax()
    ours, theirs = ((logits - exact).abs().max() for logits in (got, answers_by_modules(model, batch)))
    assert ours <= 2 * theirs + 1e-7 * scale
    padding = ~batch["attention_mask"].bool()
    for logits, bias in zip(got, head.bias, strict=True):  # as of hidden states that are 0
        assert (logits[padding] == bias).all()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("mask", [True, False])
def test_answers_by_one_call(precision, mask, taken):
    model = answering(precision)
    batch = inputs(model.config, [5, 9, 1] if mask else [11, 11], 11)
    if not mask:
        del batch["attention_mask"], batch["token_type_ids"]
    with torch.inference_mode():
        got = model(**batch)
        with no_shortcuts(model, model.bert):
            expected = model(**batch)
    assert len(taken) == 1
    assert type(got) is type(expected)
    assert vars(got).keys() == vars(expected).keys()
    assert list(got) == list(expected) == ["start_logits", "end_logits"]
    for name, logits in got.items():
        assert logits.is_contiguous()
        torch.testing.assert_close(logits, expected[name])
    assert answers(model, {name: tensor[:0] for name, tensor in batch.items()}).shape == (2, 0, 11)
    assert answers(model, {name: tensor[:, :0] for name, tensor in batch.items()}).shape == (2, len(got[0]), 0)


def other_head(model):
    model.qa_outputs = copy.deepcopy(model.qa_outputs)
    model.qa_outputs.bias.data.add_(1)


def other_bert(model):
    model.bert = copy.deepcopy(model.bert)
    model.bert.encoder.layer[0].up.bias.add_(1)


def as_attribute(model):
    bias = model.qa_outputs.bias.detach() + 1
    del model.qa_outputs.bias
    model.qa_outputs.bias = bias


def as_buffer(model):
    bias = model.qa_outputs.bias.detach() + 1
    del model.qa_outputs.bias
    model.qa_outputs.register_buffer("bias", bias)


def another_kind_of_head(model):
    model.qa_outputs = nn.Sequential(nn.ReLU(), model.qa_outputs).eval()


def broadcast_bias(model):
    model.qa_outputs.bias = nn.Parameter(torch.ones(1), requires_grad=False)


def strided_bias(model):
    model.qa_outputs.bias.data = model.qa_outputs.bias.data[:1].expand(2)  # where it was


def other_parameters(model):
    norm = model.bert.embeddings.LayerNorm
    norm._parameters = {name: nn.Parameter(2 * old.detach()) for name, old in norm._parameters.items()}


class Doubling(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        result = super().__torch_function__(function, types, arguments, options or {})
        return result.as_subclass(torch.Tensor) * 2 if function is nn.functional.linear else result


def of_a_subclass(model):
    weight = model.qa_outputs.weight.detach().as_subclass(Doubling)
    del model.qa_outputs.weight
    model.qa_outputs._parameters["weight"] = weight


def sparse(model):
    model.qa_outputs.weight = nn.Parameter((2 * model.qa_outputs.weight).detach().to_sparse_csr(), requires_grad=False)


def negated(model):
    weight = torch._neg_view(model.qa_outputs.weight.detach())
    model.qa_outputs.weight = nn.Parameter(weight, requires_grad=False)


#: Changes after which the modules are asked.
UNUSUAL_HEADS = [
    as_attribute,
    as_buffer,
    another_kind_of_head,
    broadcast_bias,
    strided_bias,
    of_a_subclass,
    sparse,
    negated,
]


@pytest.mark.parametrize("established", [True, False], ids=["afterwards", "from the start"])
@pytest.mark.parametrize("change", [*UNUSUAL_HEADS, other_parameters])
def test_unusual_heads(change, established, taken):
    model = answering()
    model.requires_grad_(False)
    batch = inputs(model.config, [5, 9, 1], 11)
    before = answers(model, batch) if established else None
    taken.clear()
    change(model)
    after = answers(model, batch)
    assert before is None or not torch.equal(after, before)
    assert (model._shortcut in taken) == (change is other_parameters)
    torch.testing.assert_close(after, answers_by_modules(model, batch))


def test_memory_that_is_gone():
    model = answering()
    batch = inputs(model.config, [5, 9, 1], 11)
    answers(model, batch)
    model.qa_outputs.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="out of bounds for storage"):
        answers(model, batch)


def test_a_table_that_is_shorter_where_it_was():
    model = packed()
    batch = inputs(model.config, [5, 9, 1], 11)
    run(model, batch)
    table = model.embeddings.word_embeddings
    table.weight.data = table.weight.data[:2]
    with pytest.raises((IndexError, RuntimeError)):
        run(model, batch)


def test_a_layer_more_is_refused_as_by_the_modules():
    model = packed()
    batch = inputs(model.config, [5, 9, 1], 11)
    run(model, batch)
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))
    with pytest.raises((ValueError, RuntimeError), match="expected 24 tensors for 2 layers, got 36"):
        run(model, batch)


@pytest.mark.parametrize("make", [packed, answering])
def test_a_shallow_copy_has_its_own_config(make):
    model = make()
    batch = inputs(model.config, [5, 9, 1], 11)
    with torch.inference_mode():
        model(**batch)
        other = copy.copy(model)
        other.config = copy.deepcopy(model.config)
        other.config.return_dict = False
        assert type(other(**batch)) is tuple
        assert type(model(**batch)) is not tuple


def test_tangents_of_a_head():
    model = answering()
    batch = inputs(model.config, [5, 9, 1], 11)
    answers(model, batch)
    weight = model.qa_outputs.weight.detach()
    with forward_ad.dual_level(), torch.no_grad():
        dual = {"qa_outputs.weight": forward_ad.make_dual(weight, torch.ones_like(weight))}
        output = torch.func.functional_call(model, dual, kwargs=batch)
        assert forward_ad.unpack_dual(output.start_logits).tangent is not None


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding, nn.LayerNorm])
@pytest.mark.parametrize("established", [True, False])
def test_classes_with_another_forward(kind, established, monkeypatch, taken):
    """As those who inject adapters give them."""
    model = answering()
    batch = inputs(model.config, [5, 9, 1], 11)
    if established:
        answers(model, batch)
        taken.clear()
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    got = answers(model, batch)
    assert model._shortcut not in taken
    assert torch.equal(got, answers_by_modules(model, batch))


#: Changes of the head, and of the model below it, after which one native call still is the answer.
CHANGES_OF_HEADS = {
    "in place": lambda model: model.qa_outputs.weight.data.mul_(2),
    "a bias in place": lambda model: model.qa_outputs.bias.data.add_(1),
    "replaced": lambda model: replace(model.qa_outputs, "weight"),
    "other memory": lambda model: other_memory(model.qa_outputs.bias),
    "swapped": lambda model: swapped(model.qa_outputs.weight),
    "another head": other_head,
    "another model": other_bert,
    "a matrix": lambda model: model.bert.encoder.layer[0].up.weight.mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES_OF_HEADS.values(), ids=CHANGES_OF_HEADS)
def test_a_change_of_a_head_is_seen(change, taken):
    model = answering()
    model.requires_grad_(False)
    batch = inputs(model.config, [5, 9, 1], 11)
    before = answers(model, batch)
    assert torch.equal(answers(model, batch), before)
    assert taken[0] is taken[1]
    change(model)
    after = answers(model, batch)
    assert not torch.equal(after, before)
    assert len(taken) == 3
    torch.testing.assert_close(after, answers_by_modules(model, batch))


class Adapted(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


def adapted(model, calls):
    model.qa_outputs.__class__ = Adapted
    calls.append("hook")


def config_of(name, value, whose="bert"):
    def change(model, calls):
        owner = getattr(model, whose) if whose else model
        owner.config = copy.deepcopy(owner.config)  # the model and its bert share one
        setattr(owner.config, name, value)
        calls.append("hook")

    return change


@pytest.mark.parametrize("established", [True, False], ids=["afterwards", "from the start"])
@pytest.mark.parametrize(
    "change",
    [
        *(hooked(name) for name in ("bert", "qa_outputs", "bert.encoder", "bert.embeddings")),
        *(overridden(name) for name in ("bert", "qa_outputs")),
        *(with_other_hooks(name) for name in ("bert", "qa_outputs")),
        *(of_another_class(name) for name in ("bert", "qa_outputs")),
        adapted,
        config_of("output_hidden_states", True),
    ],
)
def test_whoever_wants_the_modules_of_a_head_gets_them(change, established, taken):
    model, calls = answering(), []
    batch = inputs(model.config, [5, 9, 1], 11)
    if established:
        answers(model, batch)
        taken.clear()
    change(model, calls)
    got = answers(model, batch)
    assert calls
    assert model._shortcut not in taken
    assert torch.equal(got, answers_by_modules(model, batch))


@pytest.mark.parametrize("whose", ["bert", ""])
def test_configs_that_change(whose, taken):
    """Options that a config sets are looked up in every forward."""
    model = answering()
    batch = inputs(model.config, [5, 9, 1], 11)
    answers(model, batch)
    config_of("return_dict", False, whose)(model, [])
    with torch.inference_mode():
        output = model(**batch)
    assert isinstance(output, tuple) == (whose == "")
    assert len(output) == 2
    config_of("return_dict", True, whose)(model, [])
    model.bert.config._attn_implementation = "eager"  # else transformers refuses the next line
    config_of("output_attentions", True)(model, [])
    with torch.inference_mode():
        assert len(model(**batch).attentions) == 2
    config_of("output_attentions", False)(model, [])
    config_of("output_hidden_states", True)(model, [])
    with torch.inference_mode():
        assert len(model(**batch).hidden_states) == 3
        assert len(model.bert(**batch).hidden_states) == 3
    config_of("output_hidden_states", False)(model, [])
    answers(model, batch)
    config_of("max_position_embeddings", 10)(model, [])
    with pytest.raises(ValueError, match="expected at most 10 tokens"):
        answers(model, batch)


def test_what_a_head_is_not_asked_for_natively(taken):
    model = answering()
    batch = inputs(model.config, [5, 9, 1], 11)
    expected = answers(model, batch)
    taken.clear()
    marks = torch.tensor([1, 2, 0])
    with torch.inference_mode():
        assert model(**batch, start_positions=marks, end_positions=marks).loss > 0
        assert len(model(**batch, return_dict=False)) == 2
        model(**{**batch, "input_ids": batch["input_ids"].int()})
        assert len(model(**batch, output_attentions=True).attentions) == 2
        places = model(*batch.values(), torch.arange(11)[None])  # what comes fourth is position_ids
        torch.testing.assert_close(torch.stack([places.start_logits, places.end_logits]), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(**batch).start_logits.dtype == torch.bfloat16
    assert model._shortcut not in taken
    asked = answers(model, batch, return_dict=True, output_attentions=False, start_positions=None)
    assert torch.equal(asked, expected)
    assert len(taken) > 0  # that asks for nothing
    model(**batch).start_logits.sum().backward()  # the head has a gradient
    assert model.qa_outputs.weight.grad is not None


def test_bad_input_is_refused_as_by_the_modules():
    model = answering()
    batch = inputs(model.config, [5, 9, 1], 11)
    answers(model, batch)
    ids = batch["input_ids"]
    for change, error, text in (
        ({"input_ids": ids + 1000}, IndexError, r"input_ids: expected 0 to 60, got 10\d\d to 10\d\d"),
        ({"input_ids": ids[0]}, ValueError, r"input_ids: expected \[batch, length\], got \[11\]"),
        ({"attention_mask": torch.ones(3, 4)}, ValueError, r"attention_mask: expected \[3, 11\]"),
        ({"input_ids": torch.zeros(1, 30, dtype=torch.int64)}, ValueError, "expected at most 24 tokens"),
    ):
        with pytest.raises(error, match=text):
            answers(model, {"input_ids": ids, **change})
    assert answers(model, batch).isfinite().all()


def test_a_head_comes_and_goes_with_the_encoder(taken, tmp_path):
    stock = tiny_bert("BertForQuestionAnswering")
    kind, signature = type(stock), inspect.signature(stock.forward)
    model = packedbert.patch_model(stock)
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    assert inspect.signature(model.forward) == signature  # which the Trainer and pipelines read
    batch = inputs(model.config, [5, 9, 1], 11)
    expected = answers(model, batch)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert one._shortcut is None
        assert torch.equal(answers(one, batch), expected)
    model.save_pretrained(tmp_path)
    for loaded in (packedbert.load(tmp_path), kind.from_pretrained(tmp_path)):
        taken.clear()
        assert torch.equal(answers(loaded, batch), expected)
        assert len(taken) == 1
    packedbert.unpatch_model(model)
    assert type(model) is kind
    assert "_shortcut" not in vars(model)


def test_a_released_cache_takes_its_weights_along():
    model = answering()
    batch = inputs(model.config, [5], 5)
    answers(model, batch)
    memory = weakref.ref(model.bert.encoder.cache.prepared)
    model.bert.encoder.clear_cache()
    gc.collect()
    assert memory() is None
    with pytest.raises(RuntimeError, match=r"key: expected one of prepare_bert, of an encoder that is there"):
        torch.ops.packedbert.bert_prepared(batch["input_ids"], None, None, model._shortcut.key)


# ------------------------------------------------------------------------------------------------- the check


def test_are_same():
    are_same = dispatch.NATIVE.are_same
    value, other = object(), object()
    owner = {"a": value, "none": None}
    assert are_same([owner] * 3, ["a", "none", "absent"], [value, None, None])
    assert not are_same([owner], ["a"], [other])
    assert not are_same([owner], ["a"], [None])
    assert not are_same([owner], ["absent"], [value])
    assert not are_same([owner, owner], ["a", "a"], [value, other])
    assert are_same([], [], [])
    with pytest.raises(ValueError, match="are_same: expected lists of one length, got 1, 0 and 0"):
        are_same([owner], [], [])
    with pytest.raises(TypeError, match="unhashable"):
        are_same([owner], [[]], [None])
    with pytest.raises(TypeError):
        are_same((owner,), ["a"], [value])


def test_total_size():
    total_size = dispatch.NATIVE.total_size
    assert total_size([{}, {"a": 1, "b": 2}, OrderedDict(c=3)]) == 3
    assert total_size([]) == 0
    with pytest.raises(TypeError, match="total_size: expected a list of dicts"):
        total_size({})
    with pytest.raises(SystemError):
        total_size([[]])


# ------------------------------------------------------------------------------------------------- the output


@pytest.mark.parametrize("pooled", [None, torch.zeros(1, 4)])
def test_the_output_is_what_its_constructor_makes(pooled):
    values = {"last_hidden_state": torch.ones(1, 2, 4), "pooler_output": pooled, "hidden_states": None}
    kind = BaseModelOutputWithPoolingAndCrossAttentions
    got, expected = make_output(kind, **values), kind(**values)
    assert type(got) is type(expected)
    assert vars(got) == vars(expected)
    assert list(got.items()) == list(expected.items())
    assert len(got.to_tuple()) == len(expected.to_tuple())
    assert got[0] is values["last_hidden_state"]
    assert got["last_hidden_state"] is values["last_hidden_state"]
    assert got.cross_attentions is None
    again = pickle.loads(pickle.dumps(got))
    assert list(again) == list(expected)
    got.attentions = expected.attentions = (torch.ones(1),)
    assert list(got) == list(expected)  # in newer versions of transformers with it
