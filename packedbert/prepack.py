"""What the kernels make of an encoder's weights once, and keep until the weights change.

A `PrepackCache` has the copies of one encoder's matrices in the kernels' layout, and its `PreparedEncoder`: all weights
as the native CPU kernels take them, checked, which a call names by a number.
"""

import contextlib
import ctypes
import itertools
import mmap
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import dispatch

#: Tensors begin at cache lines.
_ALIGNMENT = 64


def allocate_together(kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """A tensor on the CPU for each (shape, dtype), uninitialised, side by side in one piece of memory.

    That piece is in huge pages where Linux grants them ("transparent huge pages", mode `always` or `madvise`). A
    forward reads all weights of an encoder once; with pages of 4 KiB it also walks page tables for each, which are no
    more in the caches than the weights. By hand, on one machine: 0.91 (float32) and 0.86 (int8) of the native time
    at (1, 32) with cold caches, 0.98 with warm ones. What the heap keeps of memory that was freed, as after building a
    model, can't become part of that piece, so it is given back first.
    """
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kinds]
    starts = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    if starts[-1] == 0:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)
        memory = mmap.mmap(-1, starts[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        everything = torch.frombuffer(memory, dtype=torch.uint8)
    else:
        everything = torch.empty(starts[-1], dtype=torch.uint8)
    return [
        everything[start : start + size].view(dtype).view(*shape)
        for start, size, (shape, dtype) in zip(starts, sizes, kinds, strict=False)
    ]


address_of = Tensor.data_ptr


def _version(weight: Tensor) -> int | None:
    try:
        return weight._version
    except RuntimeError:  # inference tensors have none, nor have those that were made of one by `.data =`
        return None


def _versions(weights: Sequence[Tensor]) -> list[int | None]:
    try:
        return list(map(operator.attrgetter("_version"), weights))
    except RuntimeError:
        return list(map(_version, weights))


class PreparedEncoder:
    """An encoder for the op `encoder_prepared`, which takes its `key` in the place of a hundred tensors.

    Handing those over and checking them takes longer than a layer of a short sentence.

    Args:
        weights: what the caller has; only to see whether they are still the same.
        settings: num_heads, activation, norm, eps and attention, as `ops.encoder_prepacked` takes them; of values that
            don't change.
        native: makes the weights as `ops.encoder_prepacked` takes them, each a copy or the tensor itself.

    Raises:
        RuntimeError: shapes or dtypes that do not agree, an unknown activation or norm.
    """

    def __init__(
        self, weights: Sequence[Tensor], settings: tuple[Any, ...], native: Callable[[], list[Tensor]]
    ) -> None:
        self._settings = settings
        self._weights = list(weights)
        # Before the copies are made: what another thread changes meanwhile is a change.
        self._addresses = list(map(address_of, weights))
        versions = list(map(_version, weights))
        made = native()
        # What the kernels read in place may change.
        copied = [slot for slot, own in enumerate(made) if address_of(own) != self._addresses[slot]]
        counted = [slot for slot in copied if versions[slot] is not None]
        self._counted = [weights[slot] for slot in counted]
        self._versions = [versions[slot] for slot in counted]
        # The others are asked what they are, not their version: that costs an exception.
        self._uncounted = [weights[slot] for slot in copied if versions[slot] is None]
        self._inference = list(map(Tensor.is_inference, self._uncounted))
        # They own the storage, so that no address comes back as another weight's. They are not the tensors themselves:
        # those could not be swapped (torch.utils.swap_tensors) while somebody holds them.
        self._sources = [weights[slot].detach() for slot in copied]
        held = [weight.detach() for weight in made]
        self.key: int = torch.ops.packedbert.prepare_encoder(held, *settings)
        assert dispatch.NATIVE is not None  # it has the op
        weakref.finalize(self, dispatch.NATIVE.release_encoder, self.key)

    def fits(self, weights: Sequence[Tensor], settings: tuple[Any, ...]) -> bool:
        """Whether it still is what `weights` and `settings` say: the same tensors, in the same place, unchanged."""
        return (
            self._settings == settings
            and len(self._weights) == len(weights)
            and all(map(operator.is_, self._weights, weights))
            and self.is_current()
        )

    def is_current(self) -> bool:
        """Whether the weights that it was made of are in the same place, and unchanged as far as PyTorch counts."""
        return (
            self._addresses == list(map(address_of, self._weights))
            and self._versions == _versions(self._counted)
            and self._inference == list(map(Tensor.is_inference, self._uncounted))
        )


class _Entry(NamedTuple):
    source: Tensor  # keeps the storage alive, so that its address can't come back as another weight's
    version: int | None
    prepacked: Tensor


class PrepackCache:
    """The prepacked copies of one encoder's weights, each renewed when its weight was replaced or changed.

    A change is seen by the tensor's version counter, so by `load_state_dict`, `.to()`, and in-place updates;
    not by writes through `.data`, nor to inference tensors, which PyTorch does not count: call `clear()` after those.

    An op can only carry tensors and numbers, so an encoder hands its cache over by `key`. Looking it up inside
    the op is also what lets a compiled graph notice that a weight changed.
    """

    _keys: ClassVar = itertools.count(1)
    _live: ClassVar["weakref.WeakValueDictionary[int, PrepackCache]"] = weakref.WeakValueDictionary()

    def __init__(self) -> None:
        self.key = next(self._keys)
        self._live[self.key] = self
        self._entries: dict[int, _Entry] = {}
        self._room: dict[int, Tensor] = {}  # for entries that are not there yet
        self._lock = threading.Lock()
        #: The encoder as the last call had it.
        self.prepared: PreparedEncoder | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrepackCache":
        return PrepackCache()

    def __reduce__(self) -> tuple[type["PrepackCache"], tuple[()]]:
        return PrepackCache, ()

    @classmethod
    def find(cls, key: int) -> "PrepackCache":
        """The live cache with that key, or a throw-away one."""
        return cls._live.get(key) or cls()

    def clear(self) -> None:
        """Forget everything: the next forward packs anew."""
        with self._lock:
            self.prepared = None
            self._entries.clear()
            self._room.clear()

    def reserve(self, shapes: dict[int, tuple[int, ...]], dtype: torch.dtype) -> None:
        """Make room for the copies in these slots in one piece of memory (`allocate_together`), if there are none yet.

        A copy that is renewed gets memory of its own: a call that is in progress may still read the old one.
        """
        with self._lock:
            if not self._entries and not self._room:
                places = allocate_together([(shape, dtype) for shape in shapes.values()])
                self._room = dict(zip(shapes, places, strict=True))

    def get(self, slot: int, weight: Tensor, prepack: Callable[[Tensor], Tensor]) -> Tensor:
        """The prepacked copy of the canonical weight in that slot of the encoder's list of weights."""
        version = _version(weight)
        entry = self._entries.get(slot)
        if (
            entry is None
            or entry.version != version
            or entry.source.data_ptr() != weight.data_ptr()
            or entry.source.shape != weight.shape
        ):
            with self._lock:
                self.prepared = None  # it keeps the old copy alive
                prepacked = prepack(weight)
                room = self._room.pop(slot, None)
                if room is not None and room.shape == prepacked.shape and room.dtype == prepacked.dtype:
                    prepacked = room.copy_(prepacked)
                entry = _Entry(weight.detach(), version, prepacked)
                self._entries[slot] = entry
        return entry.prepacked

    def encoder(
        self, weights: Sequence[Tensor], settings: tuple[Any, ...], native: Callable[[], list[Tensor]]
    ) -> PreparedEncoder:
        """The encoder prepared, anew if it changed: then `native()` are its weights as the kernels take them."""
        encoder = self.prepared
        if encoder is None or not encoder.fits(weights, settings):
            encoder = self.prepared = PreparedEncoder(weights, settings, native)
        return encoder
