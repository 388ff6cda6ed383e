"""What a checkpoint stores: names, shapes and pruned heads, read and checked before any weight is.

Reading is safe for files from strangers: safetensors headers, or pickles with `weights_only=True`.
"""

import os
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

#: Tensor name -> shape.
Shapes = dict[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A checkpoint that can't be what it claims to be; the text names the file or tensor, and what was expected."""


class StoredLayer(NamedTuple):
    """Widths of one encoder layer as the file stores them (FFN rows may still be zero)."""

    heads: int
    ffn_width: int


def read_shapes(files: Iterable[str | os.PathLike[str]]) -> Shapes:
    """The shapes of all tensors in safetensors or PyTorch files, without reading the weights.

    Args:
        files: paths of *.safetensors or of what torch.save wrote; the shards of one checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated, of another format, or holds pickled code.
    """
    shapes: Shapes = {}
    for file in map(Path, files):
        try:
            shapes.update(_safetensors_shapes(file) if file.suffix == ".safetensors" else _pickle_shapes(file))
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: expected a checkpoint file, found none") from error
        except (SafetensorError, OSError, EOFError) as error:
            raise CheckpointError(f"{file}: not readable ({error}); truncated? Fetch it again") from error
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise CheckpointError(
                f"{file}: expected tensors only; it is damaged, or holds pickled code, which is never run ({error})"
            ) from error
    return shapes


def _safetensors_shapes(file: Path) -> Shapes:
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _pickle_shapes(file: Path) -> Shapes:
    state = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: expected a dict of tensors, got {type(state).__name__}")
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def checkpoint_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The weight files of a folder, in the order in which transformers prefers them; empty if there are none."""
    folder = Path(folder)
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def pruned_heads(config: Any) -> dict[int, tuple[int, ...]]:
    """`config.pruned_heads` with integer keys (JSON makes them strings), checked against the config.

    Args:
        config: a BertConfig; the attribute may be missing.

    Raises:
        CheckpointError: it names a layer or head that isn't there.
    """
    stored = getattr(config, "pruned_heads", None) or {}
    pruned = {}
    for key, heads in stored.items():
        try:
            layer, gone = int(key), tuple(sorted({int(head) for head in heads}))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"config.pruned_heads: expected {{layer: [heads]}}, got {key!r}: {heads!r}"
            ) from error
        if not 0 <= layer < config.num_hidden_layers:
            raise CheckpointError(
                f"config.pruned_heads: expected layers 0 to {config.num_hidden_layers - 1}, got {layer}"
            )
        if gone and not (gone[0] >= 0 and gone[-1] < config.num_attention_heads):
            raise CheckpointError(
                f"config.pruned_heads: layer {layer}: expected heads 0 to {config.num_attention_heads - 1}, "
                f"got {list(gone)}"
            )
        pruned[layer] = gone
    return pruned


def stored_layers(config: Any, shapes: Shapes | None) -> list[StoredLayer]:
    """The widths of every encoder layer, from `config.pruned_heads` and the checkpoint's shapes together.

    Args:
        config: a BertConfig.
        shapes: from `read_shapes`, with any prefix before `encoder.layer.`; None takes the config's word, and the
            FFN at full width.

    Raises:
        CheckpointError: config and shapes, or shapes among themselves, don't agree.
    """
    pruned = pruned_heads(config)
    hidden, head_size = config.hidden_size, config.hidden_size // config.num_attention_heads
    by_layer = None if shapes is None else _by_layer(shapes)
    layers = []
    for index in range(config.num_hidden_layers):
        kept = config.num_attention_heads - len(pruned.get(index, ()))
        if by_layer is None:
            layers.append(StoredLayer(kept, config.intermediate_size))
            continue
        layer = by_layer.get(index)
        if layer is None:
            raise CheckpointError(
                f"expected the {config.num_hidden_layers} encoder layers of config.num_hidden_layers, "
                f"found no weights of layer {index}"
            )
        inner, width = layer["attention.self.value.weight"][0], layer["intermediate.dense.weight"][0]
        if index in pruned and inner != kept * head_size:
            raise CheckpointError(
                f"encoder.layer.{index}: config.pruned_heads leaves {kept} heads of {head_size}, so "
                f"{kept * head_size} value rows were expected, got {inner}"
            )
        expected = {
            "attention.self.query.weight": (inner, hidden),
            "attention.self.key.weight": (inner, hidden),
            "attention.self.value.weight": (inner, hidden),
            "attention.output.dense.weight": (hidden, inner),
            "intermediate.dense.weight": (width, hidden),
            "intermediate.dense.bias": (width,),
            "output.dense.weight": (hidden, width),
        }
        for name, shape in expected.items():
            if layer.get(name) != shape:
                raise CheckpointError(
                    f"encoder.layer.{index}.{name}: expected {list(shape)} to agree with the layer's other weights, "
                    f"got {list(layer[name]) if name in layer else 'nothing'}"
                )
        if inner % head_size:
            raise CheckpointError(
                f"encoder.layer.{index}.attention: expected a multiple of the head size {head_size}, got {inner} rows"
            )
        layers.append(StoredLayer(inner // head_size, width))
    return layers


_LAYER_KEY = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.(.+)$")


def _by_layer(shapes: Shapes) -> dict[int, Shapes]:
    layers: dict[int, Shapes] = {}
    for name, shape in shapes.items():
        if match := _LAYER_KEY.search(name):
            layers.setdefault(int(match[1]), {})[match[2]] = shape
    for index, layer in layers.items():
        for name in ("attention.self.value.weight", "intermediate.dense.weight"):
            if len(layer.get(name, ())) != 2:
                found = f"[{', '.join(map(str, layer[name]))}]" if name in layer else "nothing"
                raise CheckpointError(f"encoder.layer.{index}.{name}: expected a matrix, found {found}")
    return layers
