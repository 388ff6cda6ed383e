"""Checkpoints through both doors: in as nn_pruning stored them, out packed, in again; and the damaged ones."""

import json
import os
import pickle
import shutil

import pytest
import torch
import transformers
from models import inputs, prune, some_pruning, tiny_bert, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering

import packedbert
from packedbert import PackedBertConfig
from packedbert.checkpoint import pruned_heads, read_shapes
from packedbert.hf import TASKS, stored_task

SEED_PARAMETERS = 46_161_559


def door_from_pretrained(folder, **options):
    return AutoModelForQuestionAnswering.from_pretrained(folder, quantization_config=PackedBertConfig(), **options)


def door_load(folder, **options):
    return packedbert.load(folder, task="question-answering", **options)


DOORS = pytest.mark.parametrize("door", [door_from_pretrained, door_load])

#: Heads that the tiny checkpoint lacks; the FFN is stored full width, with zero rows.
GONE = {0: [1], 1: [0, 2, 3]}


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """A folder in nn_pruning's format, and the logits of its masked model."""
    folder = tmp_path / "checkpoint"
    config = tiny_config(architectures=["BertForQuestionAnswering"])
    heads = [["rows are zero" if head in GONE[layer] else "kept" for head in range(4)] for layer in range(2)]
    model = prune(tiny_bert("BertForQuestionAnswering", config), heads, some_pruning(config)[1])
    with torch.no_grad():  # a head that is physically gone leaves no constant behind
        for layer, gone in GONE.items():
            for head in gone:
                model.bert.encoder.layer[layer].attention.self.value.bias[head * 8 : head * 8 + 8] = 0
        batch = inputs(config, [7, 3, 9])
        logits = torch.stack(model(**batch)[:2])
    state = model.state_dict()
    for layer, gone in GONE.items():
        keep = torch.tensor([d for head in range(4) if head not in gone for d in range(head * 8, head * 8 + 8)])
        prefix = f"bert.encoder.layer.{layer}.attention."
        for name in ("query", "key", "value"):
            state[f"{prefix}self.{name}.weight"] = state[f"{prefix}self.{name}.weight"][keep]
            state[f"{prefix}self.{name}.bias"] = state[f"{prefix}self.{name}.bias"][keep]
        state[f"{prefix}output.dense.weight"] = state[f"{prefix}output.dense.weight"][:, keep]
    write(folder, config, state)
    return folder, batch, logits


def write(folder, config, state, file_format="safetensors"):
    folder.mkdir(exist_ok=True)
    settings = {**config.to_dict(), "model_type": "bert", "pruned_heads": {str(k): v for k, v in GONE.items()}}
    (folder / "config.json").write_text(json.dumps(settings))
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if file_format == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits_of(model, batch):
    with torch.no_grad():
        output = model(**batch)
    return torch.stack([output.start_logits, output.end_logits])


def assert_answers(model, batch, logits, atol=5e-6):
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits_of(model, batch)[:, real], logits[:, real], rtol=0, atol=atol)


# ----------------------------------------------------------------------------------------------------- in


@DOORS
def test_the_reference_checkpoint(reference_checkpoint, shared, door, tmp_path):
    golden = load_file(shared / "reference" / "golden_seed0.safetensors")
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    model = door(reference_checkpoint)
    assert sum(parameter.numel() for parameter in model.parameters()) == SEED_PARAMETERS
    assert model.packedbert_report.parameters_before == 93_149_186
    assert model.packedbert_report.backend == "cpu"
    expected = torch.stack([golden["start_logits_f64"], golden["end_logits_f64"]])
    real = batch["attention_mask"].bool()
    got = logits_of(model, batch)
    assert (got.double() - expected)[:, real].abs().max() < 1e-5
    with torch.no_grad():
        hidden = model.bert(**batch).last_hidden_state
    assert (hidden.double() - golden["last_hidden_state_f64"])[real].abs().max() < 1e-5

    model.save_pretrained(tmp_path)
    assert os.path.getsize(tmp_path / "model.safetensors") < SEED_PARAMETERS * 4 + 100_000
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert_same_bits(again, model)
    assert torch.equal(logits_of(again, batch)[:, real], got[:, real])


def assert_same_bits(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@DOORS
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_nn_prunings_format(tiny_checkpoint, door, file_format):
    folder, batch, logits = tiny_checkpoint
    if file_format == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    model = door(folder)
    assert_answers(model, batch, logits)
    assert [layer.heads for layer in model.packedbert_report.layers] == [(0, 2, 3), (1,)]
    assert not model.training


@DOORS
def test_ffn_that_is_stored_narrow(tiny_checkpoint, door):
    folder, batch, logits = tiny_checkpoint
    state = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"bert.encoder.layer.{layer}."
        # Rows are dropped only where nothing is lost; that leaves rows whose columns are zero, and the folding, to us.
        up, bias = state[prefix + "intermediate.dense.weight"], state[prefix + "intermediate.dense.bias"]
        down = state[prefix + "output.dense.weight"]
        keep = ((up != 0).any(1) | (bias != 0)) & (down != 0).any(0)
        state[prefix + "intermediate.dense.weight"], state[prefix + "intermediate.dense.bias"] = up[keep], bias[keep]
        state[prefix + "output.dense.weight"] = down[:, keep].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_answers(door(folder), batch, logits)


def test_heads_with_integer_keys(tiny_checkpoint):
    folder, batch, logits = tiny_checkpoint
    config = transformers.AutoConfig.from_pretrained(folder)
    config.pruned_heads = {int(layer): heads for layer, heads in config.pruned_heads.items()}
    assert_answers(door_from_pretrained(folder, config=config), batch, logits)


def test_sharded_checkpoint(tiny_checkpoint):
    folder, batch, logits = tiny_checkpoint
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    index = {}
    for part, chunk in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({name: state[name] for name in chunk}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(chunk, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for door in (door_from_pretrained, door_load):
        assert_answers(door(folder), batch, logits)


@pytest.mark.parametrize("task", TASKS)
def test_every_auto_class(task, tmp_path):
    """Both doors give the same bits, and a saved model comes back by itself."""
    auto = getattr(transformers, f"AutoModel{TASKS[task]}")
    architecture = f"Bert{TASKS[task] or 'Model'}"
    config = tiny_config()
    prune(tiny_bert(architecture, config), *some_pruning(config)).save_pretrained(tmp_path / "dense")
    loaded = packedbert.load(tmp_path / "dense", task=task)
    assert type(loaded).__name__ == architecture
    assert stored_task(tmp_path / "dense") == task
    assert_same_bits(auto.from_pretrained(tmp_path / "dense", quantization_config=PackedBertConfig()), loaded)
    loaded.save_pretrained(tmp_path / "packed")
    for again in (auto.from_pretrained(tmp_path / "packed"), packedbert.load(tmp_path / "packed", task=task)):
        assert_same_bits(again, loaded)
        assert again.packedbert_report.structure == loaded.packedbert_report.structure
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert settings["architectures"] == [architecture]


def test_a_patched_model_saves_packed(tmp_path):
    config = tiny_config()
    model = packedbert.patch_model(prune(tiny_bert("BertForQuestionAnswering", config), *some_pruning(config)))
    model.save_pretrained(tmp_path)
    assert_same_bits(AutoModelForQuestionAnswering.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path / "twice")
    packedbert.load(tmp_path).save_pretrained(tmp_path / "thrice")
    # Files may name a norm's parameters differently (transformers 5.0 brings back gamma and beta): models count.
    for name in ("twice", "thrice"):
        assert_same_bits(AutoModelForQuestionAnswering.from_pretrained(tmp_path / name), model)


def test_no_norm_checkpoint(tmp_path):
    config = tiny_config(hidden_act="relu", layer_norm_type="no_norm")
    model = prune(tiny_bert("BertForQuestionAnswering", config), *some_pruning(config))
    model.save_pretrained(tmp_path / "dense")
    loaded = packedbert.load(tmp_path / "dense")
    assert loaded.packedbert_report.structure.norm == "no_norm"
    batch = inputs(config, [5, 9])
    assert_answers(loaded, batch, logits_of(packedbert.patch_model(model), batch))
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "packed")
    assert_same_bits(again, loaded)
    assert_answers(again, batch, logits_of(loaded, batch))


def test_load_takes_fields_of_the_config(tiny_checkpoint):
    folder, batch, _ = tiny_checkpoint
    config = PackedBertConfig(precision="int8", skip=[0])
    loaded = packedbert.load(folder, config=config)
    for again in (
        packedbert.load(folder, precision="int8", skip=[0]),
        packedbert.load(folder, config=PackedBertConfig(precision="int8"), skip=[0], dtype=torch.float32),
    ):
        assert again.bert.encoder.precisions() == loaded.bert.encoder.precisions()
        assert_same_bits(again, loaded)
        torch.testing.assert_close(logits_of(again, batch), logits_of(loaded, batch), rtol=0, atol=0)
    assert "int8" in loaded.bert.encoder.precisions()[1]
    assert config.skip == ("0",)
    with pytest.raises(ValueError, match=r"precision: expected one of .*, got 'int7'"):
        packedbert.load(folder, precision="int7")


def test_load_gives_an_ordinary_model(tiny_checkpoint, tmp_path):
    folder, batch, logits = tiny_checkpoint
    model = packedbert.load(folder, config=PackedBertConfig(backend="reference"))
    assert model.packedbert_report.backend == "reference"
    with pytest.warns(packedbert.PackedBertWarning, match=r"torch\.float64"):
        double = packedbert.load(folder, dtype=torch.float64)
    assert double.dtype == torch.float64
    assert_answers(model.half().float(), batch, logits, atol=0.05)  # a quantized model would refuse this
    with pytest.raises(ValueError, match="this one was patched with keep_original=False"):
        packedbert.unpatch_model(model)
    model.save_pretrained(tmp_path / "packed")
    packed = packedbert.load(tmp_path / "packed", config=PackedBertConfig(backend="reference"))
    assert packed.packedbert_report.backend == "reference"
    with pytest.raises(ValueError, match="this one was loaded packed"):
        packedbert.unpatch_model(packed)


def test_the_callers_config_is_not_changed(tiny_checkpoint):
    folder, batch, logits = tiny_checkpoint
    config = PackedBertConfig()
    for _ in range(2):
        model = AutoModelForQuestionAnswering.from_pretrained(folder, quantization_config=config)
        assert_answers(model, batch, logits)
    assert config.layers is None


# ---------------------------------------------------------------------------------------------------- damaged


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def truncate_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def remove(folder):
    (folder / "model.safetensors").unlink()


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["PACKEDBERT_TEST_EVIL"],)


def pickle_with_code(folder):
    remove(folder)
    torch.save({"bert.embeddings.word_embeddings.weight": Evil()}, folder / "pytorch_model.bin")


def bare_pickle_with_code(folder):
    remove(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def heads_in_a_layer_that_is_not_there(folder):
    edit_config(folder, pruned_heads={"12": [0]})


def heads_that_are_not_there(folder):
    edit_config(folder, pruned_heads={"0": [4]})


def heads_that_are_no_numbers(folder):
    edit_config(folder, pruned_heads={"0": ["first"]})


def heads_that_disagree(folder):
    edit_config(folder, pruned_heads={"0": [1, 2], "1": [0, 2, 3]})


def edit_weights(folder, changes):
    state = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        state[name] = change(state[name]).contiguous()
        if state[name].numel() == 0:
            del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def widths_that_disagree(folder):
    edit_weights(folder, {"bert.encoder.layer.1.output.dense.weight": lambda w: w[:, :-1]})


def half_a_head(folder):
    prefix = "bert.encoder.layer.0.attention."
    rows = {f"{prefix}self.{name}.weight": lambda w: w[:-4] for name in ("query", "key", "value")}
    edit_weights(folder, {**rows, f"{prefix}output.dense.weight": lambda w: w[:, :-4]})
    edit_config(folder, pruned_heads={})


def missing_layer(folder):
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if ".layer.1." not in k}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def nan_weights(folder):
    edit_weights(folder, {"bert.encoder.layer.0.output.dense.weight": lambda w: w * float("nan")})


def decoder(folder):
    edit_config(folder, is_decoder=True)


@pytest.mark.filterwarnings("ignore")
@DOORS
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncate, r"model\.safetensors|incomplete|deserializ"),
        (truncate_header, r"model\.safetensors|header"),
        (remove, r"model\.safetensors"),
        (pickle_with_code, r"pytorch_model\.bin|weights_only|Weights only"),
        (bare_pickle_with_code, r"pytorch_model\.bin|weights_only|Weights only"),
        (heads_in_a_layer_that_is_not_there, "pruned_heads: expected layers 0 to 1, got 12"),
        (heads_that_are_not_there, r"pruned_heads: layer 0: expected heads 0 to 3, got \[4\]"),
        (heads_that_are_no_numbers, r"pruned_heads: expected \{layer: \[heads\]\}"),
        (heads_that_disagree, r"encoder\.layer\.0: config\.pruned_heads leaves 2 heads of 8, so 16 value rows"),
        (widths_that_disagree, r"encoder\.layer\.1\.output\.dense\.weight: expected \[32, 40\] .*, got \[32, 39\]"),
        (half_a_head, r"expected a multiple of the head size 8, got 20"),
        (missing_layer, "expected the 2 encoder layers .*, found no weights of layer 1"),
        (nan_weights, r"encoder\.layer\.0: down_weight: expected finite weights"),
        (decoder, "expected a BERT encoder, got a decoder"),
    ],
)
def test_damaged_checkpoints_are_refused(tiny_checkpoint, damage, text, door, monkeypatch, tmp_path):
    folder, _, _ = tiny_checkpoint
    monkeypatch.setenv("PACKEDBERT_TEST_EVIL", str(tmp_path / "evil"))
    damage(folder)
    with pytest.raises(Exception, match=text) as caught:
        door(folder)
    assert not isinstance(caught.value, (AttributeError, KeyError, AssertionError)), "a message, not an accident"
    assert not (tmp_path / "evil").exists()


def test_our_door_names_the_file(tiny_checkpoint):
    folder, _, _ = tiny_checkpoint
    truncate(folder)
    with pytest.raises(packedbert.CheckpointError, match=r"model\.safetensors: not readable .* truncated\?"):
        packedbert.load(folder)
    shutil.copy(__file__, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(packedbert.CheckpointError, match=r"pytorch_model\.bin: expected tensors only"):
        packedbert.load(folder)


def test_damaged_packed_checkpoints_are_refused(tiny_checkpoint, tmp_path):
    folder, _, _ = tiny_checkpoint
    packed = tmp_path / "packed"
    packedbert.load(folder).save_pretrained(packed)
    settings = json.loads((packed / "config.json").read_text())
    good = settings["quantization_config"]["layers"]

    def refuse(layers, text):
        edit_config(packed, quantization_config={"quant_method": "packedbert", "layers": layers})
        for load in (packedbert.load, AutoModelForQuestionAnswering.from_pretrained):
            with pytest.raises(ValueError, match=text):
                load(packed)

    refuse(good[:1], r"expected 2 layers \(config\.num_hidden_layers\), got 1")
    refuse([{"heads": [9], "ffn_width": 1}, good[1]], "expected distinct heads 0 to 3")
    refuse([{"heads": [0]}, good[1]], r'quantization_config\.layers: expected \{"heads"')
    refuse([{**good[0], "ffn_width": 1}, good[1]], r"encoder\.layer\.0\.up\.weight: expected \[1, 32\]")
    edit_config(packed, quantization_config={"quant_method": "packedbert", "layers": good})
    state = load_file(packed / "model.safetensors")
    del state["bert.encoder.layer.1.qkv.weight"]
    save_file(state, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(packedbert.CheckpointError, match=r"layer\.1\.qkv\.weight: expected \[24, 32\] .*, got nothing"):
        packedbert.load(packed)


def test_unknown_task_and_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"task: expected one of question-answering, .*, got 'translation'"):
        packedbert.load(tmp_path, task="translation")
    with pytest.raises(OSError, match="nowhere"):
        packedbert.load(tmp_path / "nowhere")


def test_not_a_bert(tmp_path):
    config = transformers.RobertaConfig(**tiny_config().to_dict() | {"model_type": "roberta"})
    transformers.RobertaForQuestionAnswering(config).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"expected a BERT architecture .*, got RobertaForQuestionAnswering"):
        packedbert.load(tmp_path)


def test_shapes_without_weights(tiny_checkpoint):
    folder, _, _ = tiny_checkpoint
    shapes = read_shapes([folder / "model.safetensors"])
    assert shapes["bert.encoder.layer.1.attention.self.query.weight"] == (8, 32)
    with pytest.raises(packedbert.CheckpointError, match="found none"):
        read_shapes([folder / "nothing.safetensors"])


def test_pruned_heads_of_any_config():
    assert pruned_heads(tiny_config()) == {}
    assert pruned_heads(tiny_config(pruned_heads={0: [2, 1, 1], "1": []})) == {0: (1, 2), 1: ()}
