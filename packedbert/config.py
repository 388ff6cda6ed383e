"""One configuration object for every entry point: patch_model, load, and transformers' from_pretrained."""

from collections.abc import Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from . import dispatch
from .quantization import Calibration
from .reference import ATTENTIONS, MATRICES
from .structure import LayerStructure

#: How config.json names a checkpoint that packedbert wrote.
QUANT_METHOD = "packedbert"

#: What the encoder's matrices may be stored in. Only int8 is also computed in.
PRECISIONS = ("fp32", "bf16", "fp16", "int8")


class PackedBertConfig(QuantizationConfigMixin):
    """How to run a packed model.

    transformers hands it to our quantizer, hence its base class:
    `AutoModelForQuestionAnswering.from_pretrained(id, quantization_config=PackedBertConfig())`.

    Args:
        backend: "auto" takes the fastest that works (the environment variable PACKEDBERT_BACKEND, if set, decides
            in its place); "cpu", "cuda", "triton" or "reference" force one: where it cannot run, an error is raised.
        precision: what the encoder's matrices are stored in. "fp32": as the model has them. "bf16", "fp16": rounded to
            half the size, computed in float32. "int8": a quarter of the size, and products in int8 with inputs
            quantized token by token (see packedbert/quantization.py); everything else stays in float32.
        skip: matrices that "int8" leaves in float32: layers by number (3), matrices by name ("3.down"; the others are
            qkv, attention_output, up), or "auto" for those whose outputs are off by more than
            `quantization.MAX_ERROR` on the calibration's data.
        attention: what attention's two products are computed in: "int8" or "fp32". None: int8 with precision="int8", in
            every layer whose qkv is in int8.
        int8_embeddings: store the table of word embeddings in int8, each row with a scale of its own, and look rows up
            from that: a quarter of what often is most of a pruned model. With any precision.
        calibration: from `packedbert.calibrate`: smooths outliers ("int8" works without, less exactly).
        keep_original: patch_model keeps the original encoder, so that unpatch_model can bring it back bit for bit;
            False frees it. A loaded model has no original to keep.
        release_weights: keep the encoder's matrices only as the native CPU kernels read them, instead of a second copy
            for that: half the memory for the encoder's weights. int8 matrices are always kept so.
            `state_dict` and `save_pretrained` still have the canonical ones, bit for bit; hidden states, attentions
            and other backends rebuild them at each call. Nothing happens where the native kernels don't run.
        layers: what is left of each layer, `{"heads": [...], "ffn_width": n}`, with a "head_size" where that is smaller
            than the model's. Written by packedbert into the config.json of a packed checkpoint; nothing to set by hand.

    Raises:
        ValueError: an unknown backend or precision; a skip that is neither, or "auto" without a calibration.
    """

    #: What `replace` may change, and with it the keywords of patch_model and load.
    CHOICES = (
        *("backend", "precision", "skip", "attention", "int8_embeddings", "calibration"),
        *("keep_original", "release_weights"),
    )

    def __init__(
        self,
        backend: str = "auto",
        *,
        precision: str = "fp32",
        skip: str | Sequence[int | str] = (),
        attention: str | None = None,
        int8_embeddings: bool = False,
        calibration: Calibration | None = None,
        keep_original: bool = True,
        release_weights: bool = False,
        layers: Sequence[dict[str, Any] | LayerStructure] | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method: expected {QUANT_METHOD!r}, got {quant_method!r}")
        self.quant_method = QUANT_METHOD
        self.backend = backend
        self.precision = precision
        self.skip = skip if skip == "auto" else tuple(map(_skipped, [skip] if isinstance(skip, (int, str)) else skip))
        self.attention = attention
        self.int8_embeddings = int8_embeddings
        self.calibration = calibration
        self.keep_original = keep_original
        self.release_weights = release_weights
        self.layers: tuple[LayerStructure, ...] | None = None if layers is None else tuple(map(_structure, layers))
        dispatch.requested(backend)
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        if attention not in (None, *ATTENTIONS):
            raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if precision != "int8" and (self.skip or calibration is not None or attention == "int8"):
            raise ValueError(
                "skip, calibration and attention='int8': expected with precision='int8' only, "
                f"got precision={precision!r}"
            )
        if skip == "auto" and calibration is None:
            raise ValueError(
                "skip='auto': expected a calibration to measure errors on (packedbert.calibrate), got None"
            )

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps: what the weights are, not the choices of the process that wrote it."""
        layers = None
        if self.layers is not None:
            layers = [_stored_layer(layer) for layer in self.layers]
        stored: dict[str, Any] = {"quant_method": self.quant_method, "layers": layers}
        if self.precision != "fp32":
            stored["precision"] = self.precision
        if self.precision == "int8":
            stored["skip"] = list(self.skip)
            stored["attention"] = self.resolved_attention()
        if self.int8_embeddings:
            stored["int8_embeddings"] = True
        return stored

    def resolved_attention(self) -> str:
        """What attention is computed in, of `reference.ATTENTIONS`."""
        return self.attention or ("int8" if self.precision == "int8" else "fp32")

    def replace(self, **changes: Any) -> "PackedBertConfig":
        """A copy with some fields changed.

        Raises:
            TypeError: a field that does not exist.
        """
        unknown = changes.keys() - set(self.CHOICES)
        if unknown:
            raise TypeError(
                f"PackedBertConfig: expected {', '.join(self.CHOICES[:-1])} or {self.CHOICES[-1]}, "
                f"got {', '.join(sorted(unknown))}"
            )
        fields = {name: getattr(self, name) for name in (*self.CHOICES, "layers")}
        return PackedBertConfig(**{**fields, **changes})


def _skipped(entry: int | str) -> str:
    """A layer's number, or layer and matrix, as text: "3" or "3.down"."""
    layer, _, matrix = str(entry).partition(".")
    if not layer.isdecimal() or matrix not in ("", *MATRICES):
        raise ValueError(
            f"skip: expected 'auto', or layers by number (3) and matrices by name ('3.down'; of "
            f"{', '.join(MATRICES)}), got {entry!r}"
        )
    return str(entry)


def _stored_layer(layer: LayerStructure) -> dict[str, Any]:
    """As config.json has it: without a head size if that is the model's, as before there was one."""
    stored: dict[str, Any] = {"heads": list(layer.heads), "ffn_width": layer.ffn_width}
    return stored if layer.head_size is None else {**stored, "head_size": layer.head_size}


def _structure(layer: dict[str, Any] | LayerStructure) -> LayerStructure:
    if isinstance(layer, LayerStructure):
        return layer
    try:
        head_size = layer.get("head_size")
        return LayerStructure(
            tuple(int(head) for head in layer["heads"]),
            int(layer["ffn_width"]),
            None if head_size is None else int(head_size),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            'quantization_config.layers: expected {"heads": [...], "ffn_width": n}, perhaps with a "head_size", for '
            f"each layer, got {layer!r}"
        ) from error
