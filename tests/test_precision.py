"""Models in int8 and half precision: patched, calibrated, saved and loaded."""

import copy
import json
import pickle

import pytest
import torch
from models import inputs, prune, some_pruning, tiny_bert, tiny_config
from transformers import AutoModelForQuestionAnswering

import packedbert
from packedbert import PackedBertConfig
from packedbert.layers import QuantizedLinear


def pruned(**changes):
    config = tiny_config(**changes)
    (heads, _), (rows, _) = some_pruning(config)
    return prune(tiny_bert("BertForQuestionAnswering", config), [heads] * 2, [rows] * 2)


def batch_of(model, seed=0):
    return inputs(model.config, (5, 9, 1, 7), 11, seed)


@pytest.fixture(scope="module")
def calibration():
    model = pruned()
    return packedbert.calibrate(model, [batch_of(model, seed) for seed in range(1, 9)])


def logits(model, **options):
    """Of the real tokens."""
    batch = batch_of(model)
    with torch.no_grad():
        output = model(**batch, **options)
    return torch.stack([output.start_logits, output.end_logits])[:, batch["attention_mask"] != 0]


def error(got, expected):
    """Relative, as a root mean square."""
    return ((got - expected).norm() / expected.norm()).item()


def patched(**options):
    return packedbert.patch_model(pruned(), **options)


BACKENDS = ("auto", "reference")


# ------------------------------------------------------------------------------------------------------ int8


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_gives_nearly_the_same_answers(backend):
    expected = logits(pruned())
    model = patched(precision="int8", backend=backend)
    assert 0 < error(logits(model), expected) < 0.05
    report = model.packedbert_report
    assert all(layer.precisions == ("int8",) * 4 for layer in report.layers)
    assert "int8" in str(report)
    assert report.parameters_after == patched().packedbert_report.parameters_after


def test_a_wrong_weight_would_be_seen():
    """The tolerance above can fail: swapping two heads' values goes far beyond it."""
    model = patched(precision="int8")
    part = model.bert.encoder.layer[0].down
    weight = part.quantized_weight()
    flipped = weight._replace(values=weight.values.flip(0))
    part.weight.data.copy_(packedbert.quantization.pack_quantized(flipped))
    assert error(logits(model), logits(pruned())) > 0.1


def test_the_native_encoder_and_the_reference_agree():
    native, reference = (logits(patched(precision="int8", backend=backend)) for backend in BACKENDS)
    assert error(native, reference) < 5e-3


def test_hidden_states_and_attentions_come_from_the_same_weights():
    model = patched(precision="int8", attention="fp32")
    assert error(logits(model, output_hidden_states=True), logits(model)) < 5e-3
    assert error(logits(model, output_attentions=True), logits(model)) < 5e-3


def test_skipped_matrices_stay_as_they_are():
    model = patched(precision="int8", skip=[0, "1.down"])
    assert model.packedbert_report.layers[0].precisions == ("fp32",) * 4
    assert model.packedbert_report.layers[1].precision == "int8, down fp32"
    state, original = model.state_dict(), patched().state_dict()
    assert torch.equal(state["bert.encoder.layer.1.down.weight"], original["bert.encoder.layer.1.down.weight"])
    assert state["bert.encoder.layer.1.up.weight"].dtype == torch.int8
    everything = patched(precision="int8", skip=range(2))
    assert torch.equal(logits(everything), logits(patched()))


def test_unpatch_and_copies():
    model = patched(precision="int8")
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
    original, restored = pruned().state_dict(), packedbert.unpatch_model(model).state_dict()
    assert all(torch.equal(restored[name], original[name]) for name in original)


def test_compiled():
    model = patched(precision="int8", skip=["0.qkv"])
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), expected)  # eagerly the head is another kernel, and the rest the same:
    with torch.no_grad():
        states = torch.compile(model.bert, fullgraph=True, backend="eager")(**batch_of(model)).last_hidden_state
        assert torch.equal(states, model.bert(**batch_of(model)).last_hidden_state)


def test_gradients_are_those_of_the_floats_that_int8_stands_for():
    model = patched(precision="int8")
    embeds = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=embeds).start_logits.sum().backward()
    assert embeds.grad.isfinite().all()
    assert embeds.grad.abs().max() > 0


def test_a_nan_shows():
    model = patched(precision="int8")
    embeds = torch.randn(2, 5, model.config.hidden_size)
    clean = model(inputs_embeds=embeds).start_logits
    embeds[0, 2, 3] = float("nan")
    got = model(inputs_embeds=embeds).start_logits
    assert got[0].isnan().all()
    assert torch.equal(got[1], clean[1])


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("skip", [(), ("0.qkv", "1")])
def test_an_int8_checkpoint_reloads_bit_for_bit(tmp_path, skip):
    model = patched(precision="int8", skip=skip)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["precision"] == "int8"
    for again in (packedbert.load(tmp_path), AutoModelForQuestionAnswering.from_pretrained(tmp_path)):
        assert torch.equal(logits(again), logits(model))
        one, other = again.state_dict(), model.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
        assert again.packedbert_report.parameters_before == model.packedbert_report.parameters_after
        assert [layer.precisions for layer in again.packedbert_report.layers] == [
            layer.precisions for layer in model.packedbert_report.layers
        ]
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(packedbert.load(tmp_path / "twice")), logits(model))


def test_load_quantizes_a_checkpoint_that_is_not_packed(tmp_path):
    pruned().save_pretrained(tmp_path)
    model = packedbert.load(tmp_path, config=PackedBertConfig(precision="int8"))
    assert torch.equal(logits(model), logits(patched(precision="int8")))
    direct = AutoModelForQuestionAnswering.from_pretrained(
        tmp_path, quantization_config=PackedBertConfig(precision="int8")
    )
    assert torch.equal(logits(direct), logits(model))


def test_a_packed_checkpoint_is_what_it_is(tmp_path):
    patched().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got one packed in fp32"):
        packedbert.load(tmp_path, config=PackedBertConfig(precision="int8"))


def test_int8_takes_a_quarter_of_the_bytes():
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512}

    def encoder_bytes(model):
        state = model.bert.encoder.state_dict()
        return sum(tensor.numel() * tensor.element_size() for tensor in state.values())

    full = encoder_bytes(packedbert.patch_model(pruned(**sizes)))
    assert encoder_bytes(packedbert.patch_model(pruned(**sizes), precision="int8")) < 0.28 * full
    assert encoder_bytes(packedbert.patch_model(pruned(**sizes), precision="bf16")) < 0.52 * full


def test_a_state_dict_goes_in_and_out():
    model, other = patched(precision="int8"), patched(precision="int8")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["bert.encoder.layer.0.up.weight"][:] = 0
    other.load_state_dict(state)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


# ----------------------------------------------------------------------------------------------- calibration


def test_calibration_smooths_outliers():
    """An outlier channel, as BERT's norms have them: int8 alone loses the others, smoothing saves them."""

    def with_outliers():
        model = pruned()
        for layer in model.bert.encoder.layer:
            for norm, consumers in (
                (layer.attention.output.LayerNorm, [layer.intermediate.dense]),
                (layer.output.LayerNorm, []),
            ):
                norm.weight.data[5] *= 60
                for linear in consumers:
                    linear.weight.data[:, 5] /= 60
        return model

    expected = logits(with_outliers())
    model = with_outliers()
    calibration = packedbert.calibrate(model, [batch_of(model, seed) for seed in range(1, 5)])
    assert torch.equal(logits(model), expected)  # calibrate changes nothing
    plain = packedbert.patch_model(with_outliers(), precision="int8")
    smooth = packedbert.patch_model(with_outliers(), precision="int8", calibration=calibration)
    assert error(logits(smooth), expected) < 0.5 * error(logits(plain), expected)
    assert smooth.packedbert_report.int8_errors.keys() == smooth.bert.encoder.matrices().keys()


def test_calibrating_a_packed_model_is_the_same(calibration):
    model = patched()
    again = packedbert.calibrate(model, [batch_of(model, seed) for seed in range(1, 9)])
    for name, observed in calibration["bert"].items():
        torch.testing.assert_close(again["bert"][name].largest, observed.largest)
        assert len(observed.rows) <= 256


def test_auto_skips_by_error(calibration, monkeypatch):
    model = patched(precision="int8", calibration=calibration, skip="auto")
    errors = model.packedbert_report.int8_errors
    assert len(errors) == 8
    assert all(0 <= e < 0.05 for e in errors.values())
    assert all(isinstance(part, QuantizedLinear) for part in model.bert.encoder.matrices().values())
    limit = sorted(errors.values())[4]
    monkeypatch.setattr(packedbert.quantization, "MAX_ERROR", limit)
    model = patched(precision="int8", calibration=calibration, skip="auto")
    skipped = {name for name, part in model.bert.encoder.matrices().items() if not isinstance(part, QuantizedLinear)}
    assert skipped == {name for name, e in errors.items() if e > limit}
    assert set(model.config.quantization_config.skip) == skipped


def test_texts_need_a_tokenizer(calibration):
    words = {}

    def tokenizer(*columns, **options):
        assert options["max_length"] == 12
        texts = [" ".join(row) for row in zip(*columns, strict=True)]
        rows = [[words.setdefault(word, 5 + len(words)) for word in text.split()] for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    texts = [("who is it", "it is a b c"), ("where", "here"), *[("why", "so it is")] * 9]
    observed = packedbert.calibrate(pruned(), texts, tokenizer, max_length=12)
    assert observed["bert"].keys() == calibration["bert"].keys()
    with pytest.raises(ValueError, match="expected a tokenizer with texts, got None"):
        packedbert.calibrate(pruned(), ["a text"])
    with pytest.raises(ValueError, match="expected texts or batches, got none"):
        packedbert.calibrate(pruned(), [])


def test_what_cannot_be_calibrated(calibration):
    with pytest.raises(ValueError, match="got one in int8"):
        packedbert.calibrate(patched(precision="int8"), [batch_of(pruned())])
    with pytest.raises(TypeError, match="BertModel"):
        packedbert.calibrate(torch.nn.Linear(2, 2), [{}])
    model = pruned()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="calibration: expected one of this model"):
        packedbert.patch_model(model, precision="int8", calibration={"bert": {}})
    assert type(model.bert).__name__ == "BertModel"
    assert not hasattr(model, "packedbert_report")
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "int4"}, "precision: expected one of fp32, bf16, fp16, int8, got 'int4'"),
        ({"precision": "int8", "skip": "auto"}, "skip='auto': expected a calibration"),
        ({"precision": "int8", "skip": ["down"]}, "skip: expected 'auto', or layers"),
        ({"precision": "int8", "skip": [7]}, "skip: expected layers or matrices of this model, got 7"),
        ({"skip": [1]}, "expected with precision='int8' only, got precision='fp32'"),
    ],
)
def test_impossible_choices(options, text):
    model = pruned()
    with pytest.raises(ValueError, match=text):
        packedbert.patch_model(model, **options)
    assert not hasattr(model, "packedbert_report")


# -------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 2e-3)]
)
@pytest.mark.parametrize("release", [False, True])
def test_half_precision_storage(tmp_path, precision, dtype, tolerance, release):
    model = patched(precision=precision, release_weights=release)
    assert error(logits(model), logits(pruned())) < tolerance
    rounded = patched(backend="reference", precision=precision)
    assert error(logits(model), logits(rounded)) < 1e-5
    state = model.state_dict()
    assert state["bert.encoder.layer.0.up.weight"].dtype == dtype
    assert state["bert.encoder.layer.0.up.bias"].dtype == torch.float32
    assert model.packedbert_report.layers[0].precision == precision
    model.save_pretrained(tmp_path)
    for again in (packedbert.load(tmp_path), AutoModelForQuestionAnswering.from_pretrained(tmp_path)):
        assert again.state_dict()["bert.encoder.layer.0.up.weight"].dtype == dtype
        assert torch.equal(logits(again), logits(model))


# ------------------------------------------------------------------------------------------- int8 embeddings


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.02), ("int8", 0.05)])
def test_int8_embeddings(tmp_path, precision, tolerance):
    model = patched(precision=precision, int8_embeddings=True)
    state = model.state_dict()
    assert state["bert.embeddings.word_embeddings.weight"].dtype == torch.int8
    assert 0 < error(logits(model), logits(pruned())) < tolerance
    assert model.packedbert_report.parameters_after == patched().packedbert_report.parameters_after
    model.save_pretrained(tmp_path)
    for again in (packedbert.load(tmp_path), AutoModelForQuestionAnswering.from_pretrained(tmp_path)):
        assert torch.equal(logits(again), logits(model))
    ids = torch.tensor([[1, model.config.vocab_size]])
    with pytest.raises(IndexError, match="input_ids: expected 0 to 60, got 1 to 61"):
        model(input_ids=ids)
    with pytest.raises(IndexError, match="input_ids: expected 0 to 60, got -1 to 5"):
        model(input_ids=torch.tensor([[-1, 5]]))
    original, restored = pruned().state_dict(), packedbert.unpatch_model(model).state_dict()
    assert original.keys() == restored.keys()
    assert all(torch.equal(restored[name], original[name]) for name in original)


def test_tied_embeddings_stay_as_they_are():
    model = tiny_bert("BertForMaskedLM")
    with pytest.raises(ValueError, match=r"got some that cls\.predictions\.decoder shares"):
        packedbert.patch_model(model, int8_embeddings=True)
    assert not hasattr(model, "packedbert_report")


def test_a_checkpoint_without_its_scales_is_refused(tmp_path):
    patched().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["quantization_config"]["int8_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(packedbert.CheckpointError, match="weight_scale: expected one"):
        packedbert.load(tmp_path)


@pytest.mark.parametrize(
    ("precision", "asked", "text"),
    [
        (
            "int8",
            {"precision": "int8", "int8_embeddings": True},
            "int8_embeddings: expected it where weights are packed",
        ),
        ("int8", {"precision": "int8", "skip": [1]}, "skip: expected it where weights are packed, got it with"),
        (
            "int8",
            {"precision": "int8", "calibration": {"bert": {}}},
            "calibration: expected it where weights are packed",
        ),
        (
            "fp32",
            {"int8_embeddings": True},
            "int8_embeddings: .* packed already .in fp32.; load the original checkpoint",
        ),
    ],
)
def test_what_packing_decided_is_refused_afterwards(tmp_path, precision, asked, text):
    patched(precision=precision).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=text):
        packedbert.load(tmp_path, config=packedbert.PackedBertConfig(**asked))
    packedbert.load(tmp_path, config=packedbert.PackedBertConfig(precision=precision))
