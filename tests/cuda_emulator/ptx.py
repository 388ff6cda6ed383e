"""An interpreter of the PTX that nvcc emits, so that CUDA kernels with inline PTX can be tested without a GPU.

A warp of 32 lanes is executed at a time, each instruction with numpy. Everything that a GPU would let pass silently is
a `Fault` here: accesses outside the arrays that the test handed over, misaligned accesses, registers read before they
are written, shuffles that name lanes elsewhere, barriers that not every thread reaches.

What it does not show: races between blocks, memory ordering, the last bits of the tensor cores' and of the
approximate functions' rounding (both are more accurate here), and speed.
"""

import functools
import re
from bisect import bisect_right
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import numpy as np

WARP = 32
FULL = 0xFFFFFFFF  # the mask of all lanes
LANES = np.arange(WARP, dtype=np.uint32)
ALL = slice(None)  # the positions of all lanes: indexing with it makes no copy
STEPS = np.arange(8)[:, None]
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {2: np.float16, 4: np.float32, 8: np.float64}
GAP = 256  # bytes that fault between two static shared arrays
#: Where shared and local memory lie in the generic address space; everything below is global, at host addresses.
WINDOWS = {"shared": 1 << 60, "local": 1 << 61}

Values = np.ndarray


class Fault(Exception):
    """What the GPU would have done wrong, silently or not, and where."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason, self.block, self.warp, self.instruction = reason, None, None, None

    def __str__(self):
        return f"block {self.block} warp {self.warp}: {self.reason} in: {self.instruction}"


# --- lanes ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def lanes_of(mask: int) -> Values:
    """A mask as 32 booleans."""
    return (mask >> LANES.astype(np.uint64) & 1).astype(bool)


@functools.lru_cache(maxsize=4096)
def positions_of(mask: int) -> Values | slice:
    """The numbers of the lanes in a mask, for indexing."""
    return ALL if mask == FULL else np.flatnonzero(lanes_of(mask))


def mask_of(lanes: Values) -> int:
    """32 booleans as a mask."""
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


# --- types ------------------------------------------------------------------------------------------------------------


class Type(NamedTuple):
    """How a PTX type lies in a register (unsigned bits) and what numpy computes with."""

    bytes: int
    dtype: type
    decode: Callable[[Values], Values]
    encode: Callable[[Values], Values]

    @property
    def is_float(self) -> bool:
        return np.issubdtype(self.dtype, np.floating)


def _plain(dtype: type, bytes: int) -> Type:
    """A type that numpy has. Packed types (bytes > itemsize) become arrays of 64: element 2i is the low half."""
    storage = np.bool_ if dtype is np.bool_ else UNSIGNED[bytes]
    return Type(bytes, dtype, lambda raw: raw.view(dtype), lambda v: v.astype(dtype, copy=False).view(storage))


def _from_bf16(raw: Values) -> Values:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: Values) -> Values:
    """Rounds to nearest even, once: a float64 is first rounded to odd, which keeps what decides the second rounding."""
    single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    if values.dtype == np.float64:
        truncated = bits - (np.abs(single) > np.abs(values))
        bits = np.where(single != values, truncated | 1, bits)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(single), 0x7FFF, rounded).astype(np.uint16)


TYPES = {f"{kind}{8 * n}": _plain(UNSIGNED[n], n) for kind in "bu" for n in UNSIGNED}
TYPES |= {f"s{8 * n}": _plain(SIGNED[n], n) for n in SIGNED}
TYPES |= {f"f{8 * n}": _plain(FLOAT[n], n) for n in FLOAT}
TYPES["f16x2"] = _plain(np.float16, 4)
TYPES["bf16"] = Type(2, np.float32, _from_bf16, _to_bf16)
TYPES["bf16x2"] = Type(4, np.float32, _from_bf16, lambda values: _to_bf16(values).view(np.uint32))
TYPES["pred"] = _plain(np.bool_, 1)


def literal(text: str, type: Type) -> int:
    """The bits of an immediate operand."""
    text = text.rstrip("U")
    if text[:2] in ("0f", "0F"):
        return int(text[2:], 16)
    if text[:2] in ("0d", "0D"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", text, re.I):
        return int(type.encode(np.full(1, float(text)))[0])
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)", text):
        raise Fault(f"unsupported operand {text}")
    octal = re.fullmatch(r"(-?)0([0-7]+)", text)
    return int(octal[1] + octal[2], 8) if octal else int(text, 0)


# --- memory -----------------------------------------------------------------------------------------------------------


class Segment:
    """Consecutive bytes at an address: a whole array."""

    def __init__(self, base: int, data: Values, label: str):
        self.base, self.end, self.data, self.label = base, base + data.size, data, label
        self._words: dict[int, tuple[Values, int]] = {}

    def words(self, width: int) -> tuple[Values, int]:
        """The bytes as words that lie at multiples of `width`, and the address of the first."""
        if width not in self._words:
            start = -self.base % width
            count = max(0, self.data.size - start) // width
            words = self.data[start : start + count * width].view(UNSIGNED[width])
            self._words[width] = words, self.base + start
        return self._words[width]


class Memory:
    """A state space that is exactly the given arrays, at their addresses in this process."""

    def __init__(self, arrays: Iterable[Values] = ()):
        segments = {}
        for number, array in enumerate(arrays):
            if not array.flags.c_contiguous:
                raise ValueError(f"array {number} is not contiguous")
            label = f"array {number} ({array.dtype}{list(array.shape)})"
            data = array.reshape(-1).view(np.uint8)
            segments.setdefault((array.ctypes.data, data.size), Segment(array.ctypes.data, data, label))
        self._set(segments.values())

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> "Memory":
        """A state space with addresses of its own, or one put together from others."""
        memory = cls()
        memory._set(segments)
        return memory

    def _set(self, segments: Iterable[Segment]) -> None:
        self.segments = sorted((s for s in segments if s.data.size), key=lambda s: s.base)
        self._bases = [s.base for s in self.segments]
        for one, other in zip(self.segments, self.segments[1:], strict=False):
            if one.end > other.base:
                raise ValueError(f"{one.label} and {other.label} overlap")

    def _find(self, address: int) -> Segment | None:
        """The segment that an address lies in or, if in none, the one before it."""
        place = bisect_right(self._bases, address)
        return self.segments[place - 1] if place else None

    def _split(self, addresses: Values, mask: int, size: int, write: bool) -> Iterator[tuple[Segment, Values | slice]]:
        """Which lanes access which segment; faults unless each access is aligned and inside one."""
        positions = positions_of(mask)
        chosen = addresses[positions]
        if np.bitwise_or.reduce(chosen) & (size - 1):
            wrong = np.flatnonzero(chosen & (size - 1))[0]
            raise Fault(
                f"misaligned access of {size} bytes at {int(chosen[wrong]):#x} by lane {LANES[positions][wrong]}"
            )
        segment = self._find(int(chosen[0]))
        if (
            segment is not None
            and np.minimum.reduce(chosen) >= segment.base
            and np.maximum.reduce(chosen) + size <= segment.end
        ):
            parts = {segment: positions}
        else:
            parts = {}
            for lane in LANES[positions].tolist():
                address = int(addresses[lane])
                segment = self._find(address)
                if segment is None or address + size > segment.end:
                    near = f"{address - segment.base} bytes into {segment.label}" if segment else "before every array"
                    kind = "write" if write else "read"
                    raise Fault(f"out-of-bounds {kind} of {size} bytes at {address:#x}, {near}, by lane {lane}")
                parts.setdefault(segment, []).append(lane)
        for segment, positions in parts.items():
            if write and not segment.data.flags.writeable:
                raise Fault(f"write to {segment.label}, which is read-only")
            yield segment, positions

    def gather(self, addresses: Values, mask: int, width: int, count: int = 1) -> Values:
        """Reads `count` consecutive words per lane: an array [count, 32], with anything in the lanes outside mask."""
        result = np.zeros((count, WARP), UNSIGNED[width])
        for segment, positions in self._split(addresses, mask, width * count, write=False):
            words, origin = segment.words(width)
            values = words[(addresses[positions] - origin >> SHIFT[width]) + STEPS[:count]]
            if positions is ALL:
                return values
            result[:, positions] = values
        return result

    def scatter(self, addresses: Values, mask: int, values: Values) -> None:
        """Writes [count, 32] words."""
        count, width = len(values), values.itemsize
        for segment, positions in self._split(addresses, mask, width * count, write=True):
            words, origin = segment.words(width)
            words[(addresses[positions] - origin >> SHIFT[width]) + STEPS[:count]] = values[:, positions]

    def update(self, addresses: Values, mask: int, width: int, change: Callable[[int, Values], Values]) -> Values:
        """Replaces word by word, lane after lane, with change(lane, old word); returns the old words [32]."""
        result = np.zeros(WARP, UNSIGNED[width])
        for segment, positions in self._split(addresses, mask, width, write=True):
            words, origin = segment.words(width)
            for lane in LANES[positions].tolist():
                place = (int(addresses[lane]) - origin) // width
                result[lane] = words[place]
                words[place : place + 1] = change(lane, result[lane : lane + 1])
        return result


# --- modules and kernels ----------------------------------------------------------------------------------------------

_VARIABLE = re.compile(
    r"\.(shared|local|const|global)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?\s*(?:=\s*(\{[^}]*\}|[^;]*))?;"
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.\w+\s+)*(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
)
_TOKEN = re.compile(r"\s*(?:([{}])|([\w$%]+):|([^;{}:]+(?:\{[^}]*\}[^;{}]*|::?[^;{}]*)*);)")
_STATEMENT = re.compile(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)


class Module:
    """A PTX file: its kernels by mangled name, and its variables in constant and global memory."""

    def __init__(self, text: str):
        # The compiler's word that the value of a register does not matter, not a comment like any other
        text = re.sub(r"// implicit-def: (%\w+)", r"implicit_def \1;", text)
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.S)
        text = re.sub(r"(?m)^\s*\.(loc|file|section)\b.*$", "", text)
        bodies = []
        for head in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
            depth, end = 1, head.end()
            while depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            bodies.append((*head.groups(), text[head.end() : end - 1]))
        for *_, body in bodies:
            text = text.replace(body, "", 1)
        self.variables: dict[str, Segment] = {}
        self.shared = []
        for variable in _VARIABLE.finditer(text):
            if variable[1] == "shared":
                self.shared.append(variable)
            else:
                data = _initialised(variable)
                self.variables[variable[4]] = Segment(data.ctypes.data, data, variable[4])
        self.kernels = {name: Kernel(self, name, *rest) for name, *rest in bodies}


def _size(variable: re.Match) -> int:
    return TYPES[variable[3]].bytes * (int(variable[5][1:-1] or 0) if variable[5] else 1)


def _initialised(variable: re.Match) -> Values:
    """A variable in constant or global memory, as bytes."""
    type = TYPES[variable[3]]
    words = np.zeros(_size(variable) // type.bytes, UNSIGNED[type.bytes])
    for i, item in enumerate((variable[6] or "").strip("{} \n").split(",") if variable[6] else []):
        words[i] = literal(item.strip(), type) & (1 << 8 * type.bytes) - 1
    return words.view(np.uint8)


class Register(NamedTuple):
    """A place in the register file."""

    index: int
    type: Type


class Kernel:
    """An entry of a module; its instructions are decoded when it is first launched."""

    def __init__(self, module: Module, name: str, parameters: str, attributes: str, body: str):
        self.module, self.name, self._body = module, name, body
        limit = re.search(r"\.(?:max|req)ntid\s+([\d, ]+)", attributes)
        self.max_threads = int(np.prod([int(n) for n in limit[1].split(",")])) if limit else 1024
        self.symbols: dict[str, Values] = {}  # the addresses of parameters and variables, per lane
        self.parameter_bytes = 0
        for parameter in _PARAMETER.finditer(parameters):
            size = TYPES[parameter[2]].bytes
            offset = _round_up(self.parameter_bytes, int(parameter[1] or size))
            self.symbols[parameter[3]] = np.full(WARP, offset, np.uint64)
            self.parameter_bytes = offset + size * int(parameter[4] or 1)
        self._place_variables()

    def _place_variables(self) -> None:
        self.static_shared: list[tuple[int, int, str]] = []  # address, size, name
        self.shared_end = self.local_bytes = 0
        words = set(re.findall(r"[\w$]+", self._body))
        for name, segment in self.module.variables.items():
            self.symbols[name] = np.full(WARP, segment.base, np.uint64)
        variables = [v for v in self.module.shared if v[4] in words] + list(_VARIABLE.finditer(self._body))
        for variable in sorted(variables, key=lambda v: _size(v) == 0):  # dynamic shared memory comes last
            size, align = _size(variable), int(variable[2] or 1)
            if variable[1] == "local":
                self.local_bytes = max(self.local_bytes, _round_up(size, 16))
                self.symbols[variable[4]] = LANES.astype(np.uint64) * np.uint64(_round_up(size, 16))
                continue
            address = self.shared_end = _round_up(self.shared_end, max(16, align))
            self.symbols[variable[4]] = np.full(WARP, address, np.uint64)
            if size:
                self.static_shared.append((address, size, variable[4]))
                self.shared_end = address + size + GAP
        self.shared_end = _round_up(self.shared_end, 16)

    @functools.cached_property
    def program(self) -> list["Step"]:
        """The decoded instructions."""
        instructions, labels, scope, self.registers = [], {}, ChainMap(), []
        place = 0
        body = self._body.rstrip()
        while place < len(body):
            token = _TOKEN.match(body, place)
            if token is None:
                raise ValueError(f"cannot parse: {body[place : place + 80].strip()!r}")
            place = token.end()
            brace, label, statement = token.groups()
            if brace:
                scope = scope.new_child() if brace == "{" else scope.parents
            elif label:
                labels[label] = len(instructions)
            elif statement.startswith(".reg"):
                self._declare(statement, scope)
            elif not statement.startswith("."):
                instructions.append(Instruction(self, " ".join(statement.split()), scope))
        instructions.append(Instruction(self, "ret", scope))
        return [instruction.decode(labels) for instruction in instructions]

    def _declare(self, statement: str, scope: ChainMap) -> None:
        type, names = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", statement.strip(), re.S).groups()
        for name in names.split(","):
            name, count = re.fullmatch(r"([%\w$]+)(?:<(\d+)>)?", name.strip()).groups()
            for suffix in range(int(count)) if count else [""]:
                scope[f"{name}{suffix}"] = Register(len(self.registers), TYPES[type])
                self.registers.append(TYPES[type])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(slots=True)
class Step:
    """A decoded instruction. `control` is what it does to the program counter: None, "bra", "exit" or "barrier"."""

    text: str
    opcode: str
    guard: Callable[["Warp"], Values] | None
    control: str | None
    execute: Callable[["Warp"], object] | None
    target: int = 0


DECODERS: dict[str, Callable[["Instruction"], Callable[["Warp"], object]]] = {}


def family(*names: str):
    """Marks the function that decodes the opcodes with these first parts."""

    def register(decoder):
        DECODERS.update(dict.fromkeys(names, decoder))
        return decoder

    return register


class Instruction:
    """An instruction as text, with what its decoder needs: functions that read and write its operands."""

    def __init__(self, kernel: Kernel, text: str, scope: ChainMap):
        self.kernel, self.text, self.scope = kernel, text, scope
        self.guard, self.opcode, operands = _STATEMENT.fullmatch(text).groups()
        self.name, *self.modifiers = self.opcode.split(".")
        self.operands = [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", operands)] if operands else []

    @property
    def type(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""

    def has(self, *modifiers: str) -> str | None:
        """The first of these modifiers that the instruction has."""
        return next((m for m in modifiers if m in self.modifiers), None)

    def unsupported(self, what: str = "instruction") -> Fault:
        return Fault(f"unsupported {what}")

    def decode(self, labels: dict[str, int]) -> Step:
        """What is not supported faults when it is executed, not before: slow paths are often not taken."""
        step = Step(self.text, self.opcode, None, None, None)
        try:
            if self.guard:
                step.guard = self.read(self.guard, "pred")
            if self.name == "bra":
                step.control, step.target = "bra", labels[self.operands[0]]
            elif self.name in ("ret", "exit"):
                step.control = "exit"
            elif self.name in ("bar", "barrier") and self.has("sync") and not self.has("warp"):
                step.control, step.execute = "barrier", _barrier(self)
            elif self.name not in DECODERS:
                raise self.unsupported()
            else:
                step.execute = DECODERS[self.name](self)
        except (Fault, KeyError, IndexError, TypeError) as error:
            reason = error.reason if isinstance(error, Fault) else f"unsupported instruction ({error!r})"
            step.control, step.execute = None, functools.partial(_raise, reason)
        return step

    def read(self, operand: str, type_name: str) -> Callable[["Warp"], Values]:
        """A function that returns the operand's value in 32 lanes; it must not be changed in place."""
        if operand.startswith("!"):
            positive = self.read(operand[1:], type_name)
            return lambda warp: ~positive(warp)
        type, decode = TYPES[type_name], TYPES[type_name].decode
        storage = np.bool_ if type_name == "pred" else UNSIGNED[type.bytes]
        if operand in self.scope:
            index, register_type = self.scope[operand]
            same = type.bytes == register_type.bytes

            def read_register(warp: "Warp") -> Values:
                if warp.active & ~warp.written[index]:
                    raise Fault(f"register {operand} is read before it is written")
                raw = warp.registers[index]
                return decode(raw if same else raw.astype(storage))

            return read_register
        if operand.startswith("%"):
            return lambda warp: decode(warp.special(operand).astype(storage))
        if operand in self.kernel.symbols:
            constant = decode(self.kernel.symbols[operand].astype(storage))
        else:
            constant = decode(
                np.full(WARP, literal(operand, type) & (1 << 8 * type.bytes) - 1, np.uint64).astype(storage)
            )
        return lambda warp: constant

    def write(self, operand: str, type_name: str) -> Callable[["Warp", Values], None]:
        """A function that writes the active lanes of a register, extended to its width if it is wider."""
        if operand == "_":
            return lambda warp, values: None
        index, register_type = self.scope[operand]
        encode, size = TYPES[type_name].encode, register_type.bytes
        extend = size != TYPES[type_name].bytes
        narrow, wide = (SIGNED if type_name[0] == "s" else UNSIGNED)[TYPES[type_name].bytes], SIGNED[size]

        def write_register(warp: "Warp", values: Values) -> None:
            raw = encode(values)
            if extend:
                raw = raw.view(narrow).astype(wide).view(UNSIGNED[size])
            if warp.active != FULL:  # a new array: the old one may be another register's too
                raw = np.where(lanes_of(warp.active), raw, warp.registers[index])
            warp.registers[index] = raw
            warp.written[index] |= warp.active

        return write_register

    def address(self, operand: str) -> Callable[["Warp"], Values]:
        """A function that returns the addresses that an operand like [%rd1+16] means."""
        base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        offset = int(offset, 0) if offset else 0
        register = self.scope.get(base)
        read = self.read(base, f"u{8 * register.type.bytes}" if register else "u64")
        return lambda warp: read(warp).astype(np.int64) + offset

    def elementwise(self, function: Callable[..., Values], sources: Sequence[str], result: str):
        """The decoding of most instructions: a function of the operands of the given types."""
        reads = [self.read(o, t) for o, t in zip(self.operands[1:], sources, strict=True)]
        write = self.write(self.operands[0], result)
        if len(reads) == 2:
            first, second = reads
            return lambda warp: write(warp, function(first(warp), second(warp)))
        return lambda warp: write(warp, function(*[read(warp) for read in reads]))


def _raise(reason: str, warp: "Warp") -> None:
    raise Fault(reason)


def _vector(operand: str) -> list[str]:
    """The registers of an operand that may be a list in braces."""
    return [o.strip() for o in operand.strip("{}").split(",")]


# --- moving data ------------------------------------------------------------------------------------------------------


@family("mov")
def _mov(code: Instruction):
    target, source = code.operands
    if not (target.startswith("{") or source.startswith("{")):
        return code.elementwise(lambda a: a, [code.type], code.type)
    parts = _vector(target if target.startswith("{") else source)
    part = f"b{8 * TYPES[code.type].bytes // len(parts)}"
    dtype = TYPES[part].dtype
    if target.startswith("{"):
        read, writes = code.read(source, code.type), [code.write(p, part) for p in parts]

        def unpack(warp: "Warp") -> None:
            pieces = np.ascontiguousarray(read(warp)).view(dtype).reshape(WARP, -1)
            for i, write in enumerate(writes):
                write(warp, np.ascontiguousarray(pieces[:, i]))

        return unpack
    reads, write = [code.read(p, part) for p in parts], code.write(target, f"b{8 * TYPES[code.type].bytes}")
    whole = UNSIGNED[TYPES[code.type].bytes]
    return lambda warp: write(warp, np.stack([read(warp) for read in reads], 1).view(whole).ravel())


@family("implicit_def")
def _implicit_def(code: Instruction):
    """Poison (NaN if it is a float) in a register whose value, says the compiler, does not matter."""
    size = code.scope[code.operands[0]].type.bytes
    write = code.write(code.operands[0], f"s{8 * size}")
    return lambda warp: write(warp, np.full(WARP, -1))


@family("cvta")
def _cvta(code: Instruction):
    window = WINDOWS.get(code.has("shared", "local") or "global", 0)
    shift = np.uint64(-window % 2**64 if code.has("to") else window)
    return code.elementwise(lambda a: a + shift, ["u64"], "u64")


def _access(code: Instruction, operand: str) -> Callable[["Warp"], tuple[Memory, Values]]:
    """A function that returns the memory and the addresses that an operand means in the instruction's state space."""
    address = code.address(operand)
    spaces = ("param", "global", "shared", "const", "local")
    space = next((m.split("::")[0] for m in code.modifiers if m.split("::")[0] in spaces), None)
    if space:
        return lambda warp: (warp.spaces[space], address(warp))

    def generic(warp: "Warp") -> tuple[Memory, Values]:
        addresses = address(warp)
        one = int(addresses[positions_of(warp.active)][0])
        window = next((w for w in ("local", "shared") if one >= WINDOWS[w]), None)
        return (warp.spaces[window], addresses - WINDOWS[window]) if window else (warp.spaces["global"], addresses)

    return generic


@family("ld", "ldu")
def _load(code: Instruction):
    type, access = TYPES[code.type], _access(code, code.operands[1])
    raw = f"s{8 * type.bytes}" if code.type[0] == "s" else f"b{8 * type.bytes}"
    writes = [code.write(o, raw) for o in _vector(code.operands[0])]

    def load(warp: "Warp") -> None:
        memory, addresses = access(warp)
        for write, values in zip(writes, memory.gather(addresses, warp.active, type.bytes, len(writes)), strict=True):
            write(warp, values)

    return load


@family("st")
def _store(code: Instruction):
    access, raw = _access(code, code.operands[0]), f"b{8 * TYPES[code.type].bytes}"
    reads = [code.read(o, raw) for o in _vector(code.operands[1])]

    def store(warp: "Warp") -> None:
        memory, addresses = access(warp)
        memory.scatter(addresses, warp.active, np.array([read(warp) for read in reads]))

    return store


ATOMICS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}


@family("atom", "red")
def _atomic(code: Instruction):
    operation, type = ATOMICS[code.has(*ATOMICS)], TYPES[code.type]
    raw, place = f"b{8 * type.bytes}", code.name == "atom"
    access, reads = _access(code, code.operands[place]), [code.read(o, raw) for o in code.operands[place + 1 :]]
    write = code.write(code.operands[0] if place else "_", raw)

    def update(warp: "Warp") -> None:
        memory, addresses = access(warp)
        operands = [read(warp) for read in reads]

        def change(lane: int, old: Values) -> Values:
            return type.encode(operation(type.decode(old), *[type.decode(o[lane : lane + 1]) for o in operands]))

        write(warp, memory.update(addresses, warp.active, type.bytes, change))

    return update


@family("cp")
def _cp_async(code: Instruction):
    if not code.has("async") or code.has("bulk", "mbarrier"):
        raise code.unsupported()
    if code.has("commit_group"):
        return _commit_group
    if code.has("wait_group", "wait_all"):
        left = literal(code.operands[0], TYPES["u32"]) if code.operands else None
        return lambda warp: _wait_group(warp, left)
    target, source = code.address(code.operands[0]), code.address(code.operands[1])
    size = int(code.operands[2], 0)
    third = code.operands[3] if len(code.operands) > 3 + any("cache_hint" in m for m in code.modifiers) else str(size)
    ignore = third in code.scope and code.scope[third].type is TYPES["pred"]
    read = code.read(third, "pred" if ignore else "u32")

    def copy(warp: "Warp") -> None:
        """The destination is NaN until the wait that covers the copy, so that a missing wait shows."""
        sizes, addresses, targets = read(warp), source(warp), target(warp)
        sizes = np.where(sizes, 0, size) if ignore else sizes
        whole = mask_of(sizes == size) & warp.active
        data = np.zeros((size // 4, WARP), np.uint32)
        if whole:
            data = warp.spaces["global"].gather(addresses, whole, 4, size // 4)
        if whole != FULL:
            data = np.where(lanes_of(whole), data, 0)
        rest = warp.active & ~whole & mask_of(sizes != 0)
        for lane in LANES[positions_of(rest)].tolist():
            if sizes[lane] > size or addresses[lane] % size:
                raise Fault(f"source size {sizes[lane]} of {size} at {int(addresses[lane]):#x}, by lane {lane}")
            row = np.zeros(size, np.uint8)
            for i in range(int(sizes[lane])):
                row[i] = warp.spaces["global"].gather(addresses + i, 1 << lane, 1)[0, lane]
            data[:, lane] = row.view(np.uint32)
        warp.spaces["shared"].scatter(targets, warp.active, np.full_like(data, 0xFFFFFFFF))
        warp.copies.append((targets, warp.active, data))

    return copy


def _commit_group(warp: "Warp") -> None:
    if warp.active != warp.threads:
        raise Fault("unsupported: a group of copies of a part of the warp")
    warp.groups.append(warp.copies)
    warp.copies = []


def _wait_group(warp: "Warp", left: int | None) -> None:
    """Lets all but the last `left` groups arrive; None: also the copies that are in no group yet."""
    if left is None:
        _commit_group(warp)
    elif warp.active != warp.threads:
        raise Fault("unsupported: a wait for copies by a part of the warp")
    while len(warp.groups) > (left or 0):
        for copy in warp.groups.pop(0):
            warp.spaces["shared"].scatter(*copy)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _divide(a: Values, b: Values) -> Values:
    """Integer division that truncates toward zero, as fmod does."""
    return (a - np.fmod(a, b)) // b


def _wide(type_name: str) -> str:
    return f"{type_name[0]}{2 * int(type_name[1:])}"


def _multiply_high(a: Values, b: Values) -> Values:
    bits = 8 * a.itemsize
    return (a.astype(object) * b.astype(object) >> bits).astype(a.dtype)


INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": np.fmod,
    "min": np.minimum,
    "max": np.maximum,
    "mad": lambda a, b, c: a * b + c,
    "sad": lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c,
    "abs": np.abs,
    "neg": lambda a: 0 - a,
}


def _fma(a: Values, b: Values, c: Values) -> Values:
    """The product is exact in float64 unless the operands themselves are float64: then fractions round once."""
    result = a.astype(np.float64) * b + c
    if a.dtype == np.float64:
        for i in np.flatnonzero(np.isfinite(result)):
            if exact := Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i]):
                result[i] = float(exact)
    return result


#: Functions of floats, and whether they are computed in float64 and rounded afterwards.
FLOATING = {
    "add": (np.add, False),
    "sub": (np.subtract, False),
    "mul": (np.multiply, False),
    "div": (np.divide, False),
    "min": (np.fmin, False),
    "max": (np.fmax, False),
    "fma": (_fma, False),
    "mad": (_fma, False),
    "abs": (np.abs, False),
    "neg": (np.negative, False),
    "copysign": (lambda a, b: np.copysign(b, a), False),
    "rcp": (lambda a: 1 / a, True),
    "sqrt": (np.sqrt, True),
    "rsqrt": (lambda a: 1 / np.sqrt(a), True),
    "ex2": (np.exp2, True),
    "lg2": (np.log2, True),
    "sin": (np.sin, True),
    "cos": (np.cos, True),
    "tanh": (np.tanh, True),
}


def _round_to(values: Values, dtype: type, mode: str) -> Values:
    """Rounds float64 toward zero (rz), down (rm) or up (rp)."""
    nearest = values.astype(dtype)
    if mode == "rz":
        return np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, dtype(0)), nearest)
    if mode == "rm":
        return np.where(nearest > values, np.nextafter(nearest, dtype(-np.inf)), nearest)
    return np.where(nearest < values, np.nextafter(nearest, dtype(np.inf)), nearest)


def _flush(values: Values) -> Values:
    """Subnormal float32 become zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(values.dtype.type(0), values), values)


def _saturate(values: Values) -> Values:
    return np.where(values > 0, np.minimum(values, 1), 0).astype(values.dtype)  # NaN becomes 0


def _float_function(code: Instruction, type_name: str) -> Callable[..., Values]:
    """A function of FLOATING with what the instruction's modifiers add."""
    function, in_double = FLOATING[code.name]
    if code.has("NaN"):
        function = {"min": np.minimum, "max": np.maximum}[code.name]
    rounding, flush, saturate, relu = code.has("rz", "rm", "rp"), code.has("ftz"), code.has("sat"), code.has("relu")
    dtype = TYPES[type_name].dtype
    if rounding and type_name not in ("f16", "f16x2", "f32"):
        raise code.unsupported("rounding")
    flush = flush and type_name == "f32"
    if not (rounding or flush or saturate or relu or in_double):
        return function

    def compute(*sources: Values) -> Values:
        if flush:
            sources = [_flush(s) for s in sources]
        if rounding or in_double:
            sources = [s.astype(np.float64) for s in sources]
        values = function(*sources)
        values = _round_to(values, dtype, rounding) if rounding else values
        values = _flush(values.astype(np.float32)) if flush else values
        values = _saturate(values) if saturate else values
        return np.where(values < 0, 0, values) if relu else values

    return compute


@family(*INTEGER, *FLOATING)
def _arithmetic(code: Instruction):
    type_name, count = code.type, len(code.operands) - 1
    if code.has("cc", "xorsign") or code.name in ("addc", "subc", "madc"):
        raise code.unsupported()
    if TYPES[type_name].is_float:
        return code.elementwise(_float_function(code, type_name), [type_name] * count, type_name)
    if code.has("wide"):
        wide = _wide(type_name)
        dtype, function = TYPES[wide].dtype, INTEGER[code.name]
        return code.elementwise(
            lambda a, b, *c: function(a.astype(dtype), b, *c), [type_name] * 2 + [wide] * (count - 2), wide
        )
    function = INTEGER[code.name]
    if code.has("hi"):
        function = _multiply_high if count == 2 else lambda a, b, c: _multiply_high(a, b) + c
    if code.has("sat"):
        raise code.unsupported("saturation of integers")
    return code.elementwise(function, [type_name] * count, type_name)


@family("dp4a")
def _dp4a(code: Instruction):
    first, second = (TYPES[f"{t[0]}8"].dtype for t in code.modifiers[-2:])
    result = "s32" if "s32" in code.modifiers[-2:] else "u32"

    def dot(a: Values, b: Values, c: Values) -> Values:
        return (a.view(first).astype(np.int64) * b.view(second)).reshape(WARP, 4).sum(1) + c

    return code.elementwise(dot, ["b32", "b32", result], result)


@family("cvt")
def _convert(code: Instruction):
    if len(code.operands) == 3:
        return _convert_pair(code)
    target, source = code.modifiers[-2:]
    to, of = TYPES[target], TYPES[source]
    whole = code.has("rni", "rzi", "rmi", "rpi")
    rounding, saturate, flush = code.has("rz", "rm", "rp"), code.has("sat"), code.has("ftz") and source == "f32"
    to_integer = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, None: np.trunc}[whole]
    if len(code.operands) != 2 or code.has("relu") or (rounding and target == "bf16"):
        raise code.unsupported()

    def convert(values: Values) -> Values:
        values = _flush(values) if flush else values
        if to.is_float:
            values = to_integer(values) if whole else values
            if not of.is_float and to.bytes == 2:
                values = values.astype(np.float64)
            values = _round_to(values.astype(np.float64), to.dtype, rounding) if rounding else values
            return _saturate(values) if saturate else values
        limits = np.iinfo(to.dtype)
        if of.is_float:  # to the nearest representable integer; NaN becomes 0
            values = to_integer(values.astype(np.float64))
            inside = np.where((values >= limits.min) & (values < float(limits.max)), values, 0).astype(to.dtype)
            return np.where(values >= float(limits.max), limits.max, np.where(values < limits.min, limits.min, inside))
        if saturate:
            own = np.iinfo(of.dtype)
            values = np.clip(values, max(limits.min, own.min), min(limits.max, own.max))
        return values.astype(to.dtype)

    return code.elementwise(convert, [source], target)


def _convert_pair(code: Instruction):
    """Two floats into one register: the first source becomes the upper half."""
    target, source = code.modifiers[-2:]
    encode, relu = TYPES[target.removesuffix("x2")].encode, code.has("relu")
    if not target.endswith("x2") or not code.has("rn"):
        raise code.unsupported()

    def convert(upper: Values, lower: Values) -> Values:
        pair = np.stack([lower, upper], 1).ravel()
        return encode(np.where(pair < 0, 0, pair) if relu else pair).view(np.uint32)

    return code.elementwise(convert, [source, source], "b32")


# --- comparison and logic ---------------------------------------------------------------------------------------------

COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),  # false if one is NaN, as all ordered comparisons
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}
COMPARE |= {"lo": COMPARE["lt"], "ls": COMPARE["le"], "hi": COMPARE["gt"], "hs": COMPARE["ge"]}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@family("setp")
def _setp(code: Instruction):
    compare, combine = COMPARE[code.modifiers[0]], LOGIC.get(code.modifiers[1])
    targets = code.operands[0].split("|")
    write, write_inverse = (code.write(t.strip(), "pred") for t in (*targets, "_")[:2])
    first, second = code.read(code.operands[1], code.type), code.read(code.operands[2], code.type)
    third = code.read(code.operands[3], "pred") if combine else None
    if code.type.endswith("x2"):
        raise code.unsupported("comparison of pairs")

    def execute(warp: "Warp") -> None:
        result = compare(first(warp), second(warp))
        write(warp, combine(result, third(warp)) if combine else result)
        if len(targets) > 1:
            write_inverse(warp, combine(~result, third(warp)) if combine else ~result)

    return execute


@family("set")
def _set(code: Instruction):
    compare, (target, source) = COMPARE[code.modifiers[0]], code.modifiers[-2:]
    if len(code.operands) != 3 or target.endswith("x2") != source.endswith("x2"):
        raise code.unsupported()
    true = 1 if TYPES[target].is_float else -1
    return code.elementwise(lambda a, b: compare(a, b) * np.float32(true), [source] * 2, target)


@family("selp")
def _selp(code: Instruction):
    raw = f"b{8 * TYPES[code.type].bytes}"
    if not TYPES[code.type].is_float:
        return code.elementwise(lambda a, b, p: np.where(p, a, b), [raw, raw, "pred"], raw)
    return code.elementwise(lambda a, b, p: np.where(p, a, b), [code.type] * 2 + ["pred"], code.type)


@family("and", "or", "xor")
def _logic(code: Instruction):
    return code.elementwise(LOGIC[code.name], [code.type] * 2, code.type)


@family("not")
def _not(code: Instruction):
    return code.elementwise(np.invert, [code.type], code.type)


@family("lop3")
def _lop3(code: Instruction):
    table = literal(code.operands.pop(), TYPES["u32"])
    terms = [term for term in product((1, 0), repeat=3) if table >> (4 * term[0] + 2 * term[1] + term[2]) & 1]

    def execute(*sources: Values) -> Values:
        result = np.zeros(WARP, np.uint32)
        for term in terms:
            one, two, three = (s if wanted else ~s for s, wanted in zip(sources, term, strict=True))
            result |= one & two & three
        return result

    return code.elementwise(execute, ["b32"] * 3, "b32")


def _shift_left(values: Values, amount: Values) -> Values:
    """Amounts beyond the width shift everything out, which numpy does not promise."""
    bits = 8 * values.itemsize
    shifted = values << np.minimum(amount, bits - 1).astype(values.dtype)
    return np.where(amount >= bits, values.dtype.type(0), shifted)


def _shift_right(values: Values, amount: Values) -> Values:
    bits = 8 * values.itemsize
    shifted = values >> np.minimum(amount, bits - 1).astype(values.dtype)
    return shifted if values.dtype.kind == "i" else np.where(amount >= bits, values.dtype.type(0), shifted)


@family("shl", "shr")
def _shift(code: Instruction):
    return code.elementwise(_shift_left if code.name == "shl" else _shift_right, [code.type, "u32"], code.type)


@family("shf")
def _funnel_shift(code: Instruction):
    left, wrap = code.has("l"), code.has("wrap")

    def shift(low: Values, high: Values, amount: Values) -> Values:
        both = high.astype(np.uint64) << 32 | low
        amount = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
        return (both << amount >> 32 if left else both >> amount).astype(np.uint32)

    return code.elementwise(shift, ["b32", "b32", "u32"], "b32")


@family("bfe")
def _extract_bits(code: Instruction):
    bits, signed = 8 * TYPES[code.type].bytes, code.type[0] == "s"

    def extract(values: Values, start: Values, count: Values) -> Values:
        start, asked = np.minimum(start & 255, bits), count & 255
        count = np.minimum(asked, bits - start)
        result = _shift_right(_shift_left(values, bits - start - count), bits - count)
        result = np.where(start >= bits, _shift_right(values, start), result) if signed else result
        return np.where(asked == 0, values.dtype.type(0), result)

    return code.elementwise(extract, [code.type, "u32", "u32"], code.type)


@family("bfi")
def _insert_bits(code: Instruction):
    def insert(source: Values, target: Values, start: Values, count: Values) -> Values:
        ones = np.full_like(source, np.iinfo(source.dtype).max)
        mask = _shift_left(~_shift_left(ones, count & 255), start & 255)
        return target & ~mask | _shift_left(source, start & 255) & mask

    return code.elementwise(insert, [code.type, code.type, "u32", "u32"], code.type)


def _leading_zeros(values: Values) -> Values:
    for shift in (1, 2, 4, 8, 16, 32):
        values = values | _shift_right(values, np.full(WARP, shift))
    return 8 * values.itemsize - np.bitwise_count(values).astype(np.uint32)


def _reverse_bits(values: Values) -> Values:
    bits = np.unpackbits(values.view(np.uint8).reshape(WARP, -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(values.dtype).ravel()


@family("popc", "clz", "bfind")
def _count_bits(code: Instruction):
    bits = 8 * TYPES[code.type].bytes
    functions = {"popc": np.bitwise_count, "clz": _leading_zeros, "bfind": lambda a: bits - 1 - _leading_zeros(a)}
    if code.type[0] == "s":
        raise code.unsupported()
    function = functions[code.name]
    if code.has("shiftamt"):  # how far the highest bit is from the top; all ones where there is none
        function = lambda a: np.where(a == 0, np.uint32(FULL), _leading_zeros(a))  # noqa: E731
    return code.elementwise(function, [code.type], "u32")


@family("brev")
def _brev(code: Instruction):
    return code.elementwise(_reverse_bits, [code.type], code.type)


@family("prmt")
def _permute_bytes(code: Instruction):
    if code.type != "b32" or len(code.modifiers) > 1:
        raise code.unsupported()

    def permute(a: Values, b: Values, selector: Values) -> Values:
        source = np.stack([a, b], 1).view(np.uint8)
        nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
        chosen = source[LANES[:, None], nibbles & 7]
        sign = np.where(chosen >> 7, 0xFF, 0).astype(np.uint8)
        return np.where(nibbles & 8, sign, chosen).view(np.uint32).ravel()

    return code.elementwise(permute, ["b32"] * 3, "b32")


# --- instructions of a whole warp -------------------------------------------------------------------------------------


def _check_members(warp: "Warp", members: Values) -> None:
    """All lanes that a mask names must execute the instruction together, and only they."""
    positions = positions_of(warp.active)
    named = int(np.bitwise_or.reduce(members[positions]))
    if named & ~warp.active:
        raise Fault(f"mask {named:#x} names lanes that do not execute the instruction (only {warp.active:#x} do)")
    if not (members[positions] >> LANES[positions] & 1).all():
        raise Fault(f"a lane that its mask {named:#x} does not name executes the instruction")


def _check_converged(warp: "Warp") -> None:
    if warp.active != FULL:
        raise Fault(f"only lanes {warp.active:#x} execute an instruction of the whole warp")


@family("shfl")
def _shuffle(code: Instruction):
    mode, (target, valid) = code.has("bfly", "idx", "up", "down"), (*code.operands[0].split("|"), "_")[:2]
    write, write_valid = code.write(target.strip(), "b32"), code.write(valid.strip(), "pred")
    values, lane, clamp, members = (
        code.read(o, t) for o, t in zip(code.operands[1:], ("b32", *["u32"] * 3), strict=True)
    )

    def shuffle(warp: "Warp") -> None:
        _check_members(warp, members(warp))
        offset, limits = lane(warp).astype(np.int64) & 31, clamp(warp)
        segment, clamped = limits >> 8 & 31, limits & 31
        first = LANES & segment
        last = first | clamped & ~segment
        source = {
            "bfly": LANES ^ offset,
            "idx": first | offset & ~segment.astype(np.int64),
            "down": LANES + offset,
            "up": LANES - offset,
        }[mode]
        # For `up` the clamp value is the lowest lane, for the others the highest
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, LANES)
        active = lanes_of(warp.active)
        if not active[source[active]].all():
            raise Fault("a lane reads from one that does not execute the shuffle")
        write(warp, values(warp)[source])
        write_valid(warp, inside)

    return shuffle


@family("vote")
def _vote(code: Instruction):
    mode = code.has("ballot", "all", "any", "uni")
    predicate, members = code.read(code.operands[1], "pred"), code.read(code.operands[2], "u32")
    write = code.write(code.operands[0], "b32" if mode == "ballot" else "pred")

    def vote(warp: "Warp") -> None:
        named = members(warp)
        _check_members(warp, named)
        ballot = np.uint32(mask_of(predicate(warp))) & named
        results = {
            "ballot": ballot,
            "all": ballot == named,
            "any": ballot != 0,
            "uni": (ballot == 0) | (ballot == named),
        }
        write(warp, results[mode])

    return vote


@family("activemask")
def _activemask(code: Instruction):
    write = code.write(code.operands[0], "b32")
    return lambda warp: write(warp, np.full(WARP, warp.active, np.uint32))


@family("redux")
def _redux(code: Instruction):
    operation, members = ATOMICS[code.has("add", "min", "max", "and", "or", "xor")], code.read(code.operands[2], "u32")
    read, write = code.read(code.operands[1], code.type), code.write(code.operands[0], code.type)

    def reduce(warp: "Warp") -> None:
        named, values = members(warp), read(warp)
        _check_members(warp, named)
        write(warp, np.array([operation.reduce(values[positions_of(int(m) or 1)]) for m in named], values.dtype))

    return reduce


@family("ldmatrix")
def _ldmatrix(code: Instruction):
    address, writes = _access(code, code.operands[1]), [code.write(r, "b32") for r in _vector(code.operands[0])]
    lanes, transpose = (1 << 8 * len(writes)) - 1, code.has("trans")
    if not code.has("m8n8") or code.type != "b16":
        raise code.unsupported()

    def load(warp: "Warp") -> None:
        _check_converged(warp)
        memory, addresses = address(warp)
        rows = np.ascontiguousarray(memory.gather(addresses, lanes, 4, 4).T)  # [lane, 4 words of 2 halves]
        if transpose:
            rows = np.ascontiguousarray(rows.view(np.uint16).reshape(4, 8, 8).transpose(0, 2, 1)).view(np.uint32)
        for write, fragment in zip(writes, rows.reshape(4, WARP), strict=False):
            write(warp, fragment)

    return load


def _fragment_order(registers: int, pack: int, second: bool) -> Values:
    """Where each element of mma's first matrix [16, k], or second one [k, 8], lies among its registers' elements.

    A register holds `pack` elements, consecutive along k, of the lane's row (or column) lane / 4.
    """
    register, lane, element = np.meshgrid(np.arange(registers), np.arange(WARP), np.arange(pack), indexing="ij")
    outer, inner = lane >> 2, pack * (lane & 3) + element
    if second:
        row, column = inner + 4 * pack * register, outer
    else:
        row, column = outer + 8 * (register & 1), inner + 4 * pack * (register >> 1)
    order = np.empty((row.max() + 1, column.max() + 1), np.int64)
    order[row, column] = np.arange(row.size).reshape(row.shape)
    return order


#: Where each of mma's four results per lane lies in the matrix [16, 8]: register i is row lane / 4 + 8 * (i / 2).
RESULT_ORDER = (LANES // 4 + 8 * (STEPS[:4] >> 1)) * 8 + 2 * (LANES & 3) + (STEPS[:4] & 1)
#: Elements of mma: how many a register packs, and the type to compute in (float64 holds sums of integers exactly).
MMA_ELEMENTS = {"f16": (2, np.float32), "bf16": (2, np.float32), "s8": (4, np.float64), "u8": (4, np.float64)}


@family("mma")
def _mma(code: Instruction):
    result, first, second, accumulator = code.modifiers[-4:]
    targets, *sources = (_vector(o) for o in code.operands)
    pack, compute = MMA_ELEMENTS[first]
    expected = "f32" if compute is np.float32 else "s32"
    shape = f"m16n8k{8 * pack if len(sources[0]) == 4 else 4 * pack}"
    if shape not in code.modifiers or len(targets) != 4 or {result, accumulator} != {expected} or code.has("satfinite"):
        raise code.unsupported("shape or types")
    decoders = [TYPES[t].decode if t == "bf16" else functools.partial(_view, TYPES[t].dtype) for t in (first, second)]
    orders = _fragment_order(len(sources[0]), pack, False), _fragment_order(len(sources[1]), pack, True)
    reads = [[code.read(register, "b32") for register in registers] for registers in sources[:2]]
    reads_accumulator = [code.read(register, expected) for register in sources[2]]
    writes = [code.write(register, expected) for register in targets]

    def multiply(warp: "Warp") -> None:
        _check_converged(warp)
        one, two = (
            decode(np.concatenate([read(warp) for read in registers])).astype(compute, copy=False)[order]
            for registers, decode, order in zip(reads, decoders, orders, strict=True)
        )
        results = (one @ two).ravel()[RESULT_ORDER]
        results = results + np.array([read(warp) for read in reads_accumulator])
        if expected == "s32":
            results = results.astype(np.int64)
        for write, values in zip(writes, results, strict=True):
            write(warp, values)

    return multiply


def _view(dtype: type, raw: Values) -> Values:
    return raw.view(dtype)


@family("bar", "barrier")
def _warp_barrier(code: Instruction):
    if not (code.has("warp") and code.has("sync")):
        raise code.unsupported()
    members = code.read(code.operands[0], "u32")
    return lambda warp: _check_members(warp, members(warp))


def _barrier(code: Instruction):
    """Returns the number of the barrier that the block's warps are to meet at."""
    number = code.read(code.operands[0], "u32")
    count = code.read(code.operands[1], "u32") if len(code.operands) > 1 else None

    def barrier(warp: "Warp") -> int:
        if warp.active != warp.threads:
            raise Fault(f"barrier in divergent code: lanes {warp.active:#x} of {warp.threads:#x} execute it")
        if count is not None and int(count(warp)[0]) != warp.block_threads:
            raise Fault("unsupported: barrier of a part of the block")
        return int(number(warp)[0])

    return barrier


@family("membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol")
def _nothing(code: Instruction):
    return lambda warp: None


@family("trap", "brkpt")
def _trap(code: Instruction):
    return functools.partial(_raise, "trap")


# --- execution --------------------------------------------------------------------------------------------------------


class Warp:
    """32 lanes of a block: their registers, and where each of them is."""

    def __init__(
        self, kernel: Kernel, number: int, geometry: dict[str, tuple[int, int, int]], spaces: dict[str, Memory]
    ):
        self.kernel, self.number, self.geometry, self.spaces = kernel, number, geometry, spaces
        x, y, z = geometry["ntid"]
        self.block_threads = x * y * z
        thread = number * WARP + np.arange(WARP)
        self.thread = thread % x, thread // x % y, thread // (x * y)
        self.threads = mask_of(thread < self.block_threads)  # the lanes that there are
        self.active = self.threads  # the lanes that execute the current instruction
        self.registers = [
            np.zeros(WARP, np.bool_ if t is TYPES["pred"] else UNSIGNED[t.bytes]) for t in kernel.registers
        ]
        self.written = [0] * len(self.registers)
        self.copies: list = []  # cp.async: since the last commit_group
        self.groups: list[list] = []

    def special(self, name: str) -> Values:
        """A special register such as %tid.x."""
        name, _, axis = name[1:].partition(".")
        if name == "tid":
            return self.thread["xyz".index(axis)]
        if name in self.geometry:
            return np.full(WARP, self.geometry[name]["xyz".index(axis)])
        if name == "laneid":
            return LANES
        if name == "warpid":
            return np.full(WARP, self.number)
        bit = np.uint64(1) << LANES.astype(np.uint64)
        masks = {"eq": bit, "lt": bit - 1, "le": 2 * bit - 1, "gt": FULL & ~(2 * bit - 1), "ge": FULL & ~(bit - 1)}
        if name.removeprefix("lanemask_") in masks:
            return masks[name.removeprefix("lanemask_")]
        raise Fault(f"unsupported register %{name}")

    def run(self, executed: list[int]) -> Iterator[int]:
        """Runs until the next barrier, whose number it yields; counts the instructions by their places.

        The lanes that are furthest behind go first, so that the branches of structured code meet again.
        """
        program, paths = self.kernel.program, {0: self.threads}  # the lanes at each place of the program
        while paths:
            place = min(paths)
            active = self.active = paths.pop(place)
            step = program[place]
            executed[place] += 1
            barrier = None
            try:
                if step.guard is not None:
                    self.active &= mask_of(step.guard(self))
                if step.control == "barrier" or (step.execute and self.active):
                    barrier = step.execute(self)
            except Fault as fault:
                fault.block, fault.warp, fault.instruction = self.geometry["ctaid"], self.number, step.text
                raise
            if step.control == "bra" and self.active:
                paths[step.target] = paths.get(step.target, 0) | self.active
                active &= ~self.active
            elif step.control == "exit":
                active &= ~self.active
            elif step.control == "barrier":
                yield barrier
            if active:
                paths[place + 1] = paths.get(place + 1, 0) | active


@dataclass
class Statistics:
    """What a launch executed, in instructions of a warp."""

    opcodes: Counter = field(default_factory=Counter)  # by whole opcode, such as "ld.global.nc.f32"

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def count(self, prefix: str) -> int:
        """How many had opcodes with these first parts, such as "mma" or "ld.global"."""
        return sum(n for opcode, n in self.opcodes.items() if f"{opcode}.".startswith(f"{prefix}."))


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    parameters: bytes,
    memory: Memory,
    seed: int = 0,
    blocks: Iterable[tuple[int, int, int]] | None = None,
) -> Statistics:
    """Runs a kernel, or only some blocks of its grid, one block after the other.

    Args:
        kernel: what Module.kernels holds.
        grid: blocks along x, y, z.
        block: threads along x, y, z.
        shared_bytes: the size of dynamic shared memory; it is NaN at the start of each block, as static arrays are.
        parameters: the bytes of the kernel's parameters; pointers are addresses in this process.
        memory: the arrays that the kernel may access.
        seed: of the order of the warps between barriers.
        blocks: the indices of the blocks to run; None: all.
    """
    if np.prod(block) > kernel.max_threads:
        raise ValueError(f"{np.prod(block)} threads a block, but {kernel.name} is compiled for {kernel.max_threads}")
    if len(parameters) < kernel.parameter_bytes:
        raise ValueError(f"{len(parameters)} bytes of parameters, but {kernel.name} takes {kernel.parameter_bytes}")
    if blocks is None:
        blocks = [(x, y, z) for z, y, x in product(*(range(n) for n in reversed(grid)))]
    everything = Memory.of([*memory.segments, *kernel.module.variables.values()])
    constants = Segment(0, np.frombuffer(parameters, np.uint8, kernel.parameter_bytes), "the parameters")
    random, program = np.random.default_rng(seed), kernel.program
    executed = [0] * len(program)
    for index in blocks:
        layout = [*kernel.static_shared, (kernel.shared_end, shared_bytes, "dynamic shared memory")]
        shared = Memory.of(Segment(base, np.full(size, 0xFF, np.uint8), name) for base, size, name in layout)
        warps = []
        for number in range(-(-int(np.prod(block)) // WARP)):
            local = Segment(0, np.full(WARP * kernel.local_bytes, 0xFF, np.uint8), "local memory")
            spaces = {"global": everything, "const": everything, "shared": shared, "local": Memory.of([local])}
            spaces["param"] = Memory.of([constants])
            warps.append(Warp(kernel, number, {"ntid": block, "nctaid": grid, "ctaid": index}, spaces))
        with np.errstate(all="ignore"):
            _run_block(warps, executed, random)
    statistics = Statistics()
    for step, count in zip(program, executed, strict=True):
        if count:
            statistics.opcodes[step.opcode] += count
    return statistics


def _run_block(warps: list[Warp], executed: list[int], random: np.random.Generator) -> None:
    """Runs all warps from barrier to barrier."""
    running = [warp.run(executed) for warp in warps]
    while True:
        barriers = {int(i): next(running[i], None) for i in random.permutation(len(running))}
        if len(set(barriers.values())) > 1:
            # None: the warp has ended. A GPU would hang, or count the threads that have left as present
            states = {b: [i for i in sorted(barriers) if barriers[i] == b] for b in barriers.values()}
            said = ", ".join(
                f"warps {w} " + ("have exited" if b is None else f"wait at barrier {b}") for b, w in states.items()
            )
            fault = Fault(f"deadlock: {said}")
            fault.block, fault.warp, fault.instruction = warps[0].geometry["ctaid"], sorted(barriers), "bar.sync"
            raise fault
        if None in barriers.values():
            return
