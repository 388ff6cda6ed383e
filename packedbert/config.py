"""One configuration object for every entry point: patch_model, load, and transformers' from_pretrained."""

from collections.abc import Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from . import dispatch
from .structure import LayerStructure

#: How config.json names a checkpoint that packedbert wrote.
QUANT_METHOD = "packedbert"


class PackedBertConfig(QuantizationConfigMixin):
    """How to run a packed model.

    transformers hands it to our quantizer, hence its base class:
    `AutoModelForQuestionAnswering.from_pretrained(id, quantization_config=PackedBertConfig())`.

    Args:
        backend: "auto" takes the fastest that works (the environment variable PACKEDBERT_BACKEND, if set, decides
            in its place); "cpu" or "reference" force one: where it cannot run, an error is raised.
        keep_original: patch_model keeps the original encoder, so that unpatch_model can bring it back bit for bit;
            False frees it. A loaded model has no original to keep.
        release_weights: keep the encoder's matrices only as the native CPU kernels read them, instead of a second copy
            for that: half the memory for the encoder's weights.
            `state_dict` and `save_pretrained` still have the canonical ones, bit for bit; hidden states, attentions
            and other backends rebuild them at each call. Nothing happens where the native kernels don't run.
        layers: what is left of each layer, `{"heads": [...], "ffn_width": n}`. Written by packedbert into the
            config.json of a packed checkpoint; nothing to set by hand.

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        keep_original: bool = True,
        release_weights: bool = False,
        layers: Sequence[dict[str, Any] | LayerStructure] | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method: expected {QUANT_METHOD!r}, got {quant_method!r}")
        self.quant_method = QUANT_METHOD
        self.backend = backend
        self.keep_original = keep_original
        self.release_weights = release_weights
        self.layers: tuple[LayerStructure, ...] | None = None if layers is None else tuple(map(_structure, layers))
        dispatch.requested(backend)

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps: the structure, not the choices of the process that wrote it."""
        layers = None
        if self.layers is not None:
            layers = [{"heads": list(layer.heads), "ffn_width": layer.ffn_width} for layer in self.layers]
        return {"quant_method": self.quant_method, "layers": layers}

    def replace(self, **changes: Any) -> "PackedBertConfig":
        """A copy with some fields changed.

        Raises:
            TypeError: a field that does not exist.
        """
        fields = {name: getattr(self, name) for name in ("backend", "keep_original", "release_weights", "layers")}
        unknown = changes.keys() - fields
        if unknown:
            raise TypeError(
                "PackedBertConfig: expected backend, keep_original or release_weights, "
                f"got {', '.join(sorted(unknown))}"
            )
        return PackedBertConfig(**{**fields, **changes})


def _structure(layer: dict[str, Any] | LayerStructure) -> LayerStructure:
    if isinstance(layer, LayerStructure):
        return layer
    try:
        return LayerStructure(tuple(int(head) for head in layer["heads"]), int(layer["ffn_width"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'quantization_config.layers: expected {{"heads": [...], "ffn_width": n}} for each layer, got {layer!r}'
        ) from error
