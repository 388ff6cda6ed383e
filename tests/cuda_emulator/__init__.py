"""The CUDA kernels of csrc/cuda without a GPU: compiled by g++, run by emulator.cpp, and called from here.

`run` calls them in a child process (an emulated crash must not take pytest with it), in one of three builds (`MODES`).
The functions of `Kernels` take and return numpy arrays; bfloat16 is uint16. Every buffer is its own array of the exact
size, and filled with NaN before a kernel writes it.
"""

import functools
import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
#: What each build is for -> (flags of the kernels, flags of the emulator).
MODES = {
    "plain": ([], []),
    "races": (["-fsanitize=thread"], []),  # the hooks are the emulator's own
    "address": (_SANITIZE, _SANITIZE),
}

DTYPES = ("float32", "float16", "bfloat16")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_new")
NORMS = ("none", "layer_norm", "no_norm")
EIGHT = 8


def why_not() -> str:
    """Why the emulator can't be built here; empty if it can."""
    if not (CUDA_HOME / "include/cuda_runtime.h").exists():
        return f"needs a CUDA toolkit's headers, looked for include/cuda_runtime.h in {CUDA_HOME}"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    return ""


def build(mode: str, csrc: Path = CSRC) -> Path:
    """Compile the kernels below `csrc` for a mode, or find what was compiled from the same sources before."""
    import pybind11

    sources = [
        *sorted((csrc / "cuda").glob("*.cu")),
        *(csrc / "cuda").glob("*.cpp"),
        HERE / "emulator.cpp",
        HERE / "bindings.cpp",
    ]
    headers = sorted([*csrc.glob("*.h"), *(csrc / "cuda").glob("*.*h"), HERE / "emulator.h"])
    of_all = repr(MODES[mode]).encode() + b"".join(file.read_bytes() for file in headers)
    cache = Path(tempfile.gettempdir()) / f"packedbert-emulator-{os.getuid()}"
    cache.mkdir(exist_ok=True)
    # Named after what they are made from, so that only what changed is compiled.
    objects = [
        cache / f"{file.stem}-{hashlib.sha256(of_all + file.read_bytes()).hexdigest()[:16]}.o" for file in sources
    ]
    folder = cache / hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    library = folder / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    of_kernels, of_emulator = MODES[mode]
    common = ["-std=c++20", "-O2", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DPACKEDBERT_EMULATED"]
    common += [f"-I{csrc}", f"-I{HERE}", f"-I{CUDA_HOME / 'include'}", f"-I{pybind11.get_include()}"]
    common += [f"-I{sysconfig.get_path('include')}", "-DPACKEDBERT_EMULATOR_MODULE=emulated"]
    compilers = []
    for source, target in zip(sources, objects, strict=True):
        if target.exists():
            continue
        flags = of_emulator
        if source.suffix == ".cu":
            flags = [*of_kernels, "-include", str(HERE / "emulator.h"), "-x", "c++"]
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = ["g++", *common, *flags, "-c", source, "-o", unfinished]
        compilers.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), unfinished, target))
    for compiler, unfinished, target in compilers:
        errors = compiler.communicate()[1]
        if compiler.returncode:
            raise RuntimeError(f"the emulator doesn't compile ({mode}):\n{errors}")
        unfinished.rename(target)
    folder.mkdir(exist_ok=True)
    unfinished = folder / f"unfinished.{os.getpid()}"
    subprocess.run(["g++", "-shared", *of_emulator, *objects, "-ldl", "-o", unfinished], check=True)
    unfinished.rename(library)
    return library


def address(array: np.ndarray | None) -> int:
    """Where an array begins; 0 for none."""
    return 0 if array is None else array.ctypes.data


def pitch(columns: int, dtype: str) -> int:
    """Elements from row to row, if rows are to begin at multiples of 16 bytes (csrc/cuda/dtype.h)."""
    return -(-columns // (per := 16 // itemsize(dtype))) * per


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def empty(shape: tuple[int, ...] | int, dtype: str) -> np.ndarray:
    """An array full of NaN."""
    if dtype == "bfloat16":
        return np.full(shape, 0xFFFF, np.uint16)
    return np.full(shape, np.nan, dtype)


def pitched(matrix: np.ndarray, dtype: str) -> np.ndarray:
    """A copy whose rows begin at multiples of 16 bytes, with NaN between them."""
    copy = empty((matrix.shape[0], pitch(matrix.shape[1], dtype)), dtype)
    copy[:, : matrix.shape[1]] = matrix
    return copy


class Kernels:
    """The kernels of one build, in this process.

    Args:
        mode: one of `MODES`.
        csrc: the sources.
        **options: of the emulator, see emulator.h.
    """

    def __init__(self, mode: str = "plain", csrc: Path = CSRC, **options: Any) -> None:
        self.module = _load(build(mode, csrc))
        self.buffers: list[np.ndarray] = []
        settings = {"seed": 0, "copies_land": 1, "races": mode == "races", "only_record": False, "overlaps": False}
        settings |= options
        self.module.configure(*settings.values())

    def launches(self) -> list[dict[str, Any]]:
        """What was launched since this object was made."""
        return self.module.launches()

    def _at(self, array: np.ndarray | None) -> int:
        if array is not None:
            self.buffers.append(array)
        return address(array)

    def prepack(self, weight: np.ndarray) -> np.ndarray:
        """[out_features, in_features] in half precision -> as the kernel takes it."""
        out_features, in_features = weight.shape
        packed = empty((-(-out_features // 64), -(-in_features // 32), 64, 32), "bfloat16")
        self.module.prepack_weight(self._at(weight), out_features, in_features, self._at(packed))
        return packed

    def linear(
        self,
        dtype: str,
        input: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
        plan: tuple[int, int, int],
        activation: str = "none",
        residual: np.ndarray | None = None,
        rows_used: int | None = None,
        padded_rows: bool = True,
    ) -> np.ndarray:
        """activation(input weight^T + bias) + residual; with splits, or activation "sums", the sums of products.

        `padded_rows`: residual and output have rows at multiples of 16 bytes.
        """
        rows, in_features = input.shape
        out_features = weight.shape[0]
        packed = self.prepack(weight)
        x = pitched(input, dtype)
        used = None if rows_used is None else np.array([rows_used], np.int32)
        sums = output = None
        if activation == "sums":
            sums = empty((plan[2], rows, out_features), "float32")
        else:
            output = empty((rows, pitch(out_features, dtype) if padded_rows else out_features), dtype)
        if residual is not None and padded_rows:
            residual = pitched(residual, dtype)
        self.module.packed_linear(
            *(DTYPES.index(dtype), plan, rows, in_features, out_features, self._at(used)),
            *(self._at(x), x.shape[1], self._at(packed), self._at(bias)),
            *(self._at(residual), 0 if residual is None else residual.shape[1]),
            *(self._at(output), 0 if output is None else output.shape[1], self._at(sums)),
            0 if activation == "sums" else ACTIVATIONS.index(activation),
        )
        return sums.sum(0, dtype=np.float64) if sums is not None else output[:, :out_features]

    def rows(
        self,
        dtype: str,
        sums: np.ndarray | None,
        input: np.ndarray | None,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        activation: str,
        norm: str,
        norm_weight: np.ndarray | None,
        norm_bias: np.ndarray | None,
        eps: float = 1e-5,
        output_rows: np.ndarray | None = None,
        padded_rows: bool = True,
    ) -> np.ndarray:
        """norm(activation(sum of sums, or input, + bias) + residual)."""
        like = next(x for x in (input, residual, None if sums is None else sums[0]) if x is not None)
        count, size = like.shape
        lay_out = functools.partial(pitched, dtype=dtype) if padded_rows else np.ascontiguousarray
        x = None if input is None else lay_out(input)
        r = None if residual is None else lay_out(residual)
        out_rows = count if output_rows is None else int(output_rows.max()) + 1
        output = empty((out_rows, pitch(size, dtype) if padded_rows else size), dtype)
        self.module.row_epilogue(
            *(DTYPES.index(dtype), count, size, 0, self._at(sums), 0 if sums is None else len(sums)),
            *(self._at(x), 0 if x is None else x.shape[1], self._at(bias)),
            *(self._at(r), 0 if r is None else r.shape[1], self._at(norm_weight), self._at(norm_bias)),
            *(self._at(output), output.shape[1], self._at(output_rows)),
            *(ACTIVATIONS.index(activation), NORMS.index(norm), eps),
        )
        return output[:, :size]

    def gather(self, dtype: str, padded: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """(cu_seqlens, tokens, positions, output) of padded [batch, length, hidden_size]."""
        batch, length, size = padded.shape
        cu_seqlens = np.full(batch + 1, -1, np.int32)
        tokens = empty((batch * length, pitch(size, dtype)), dtype)
        positions = np.full(batch * length, -1, np.int32)
        output = empty(padded.shape, dtype)
        self.module.gather_tokens(
            *(DTYPES.index(dtype), batch, length, size, self._at(mask), self._at(padded), self._at(cu_seqlens)),
            *(self._at(tokens), tokens.shape[1], self._at(positions), self._at(output)),
        )
        return cu_seqlens, tokens[:, :size], positions, output

    def attention(
        self, dtype: str, qkv: np.ndarray, cu_seqlens: np.ndarray, heads: int, padded_rows: bool = True
    ) -> np.ndarray:
        """[tokens, 3 * heads * head_size] -> [tokens, heads * head_size]."""
        tokens, width = qkv.shape[0], qkv.shape[1] // 3
        x = pitched(qkv, dtype) if padded_rows else qkv
        output = empty((tokens, pitch(width, dtype) if padded_rows else width), dtype)
        self.module.pruned_attention(
            *(DTYPES.index(dtype), tokens, len(cu_seqlens) - 1, heads, width // heads, self._at(cu_seqlens)),
            *(self._at(x), x.shape[1], self._at(output), output.shape[1]),
        )
        return output[:, :width]

    def encoder(
        self,
        dtype: str,
        hidden_states: np.ndarray,
        mask: np.ndarray | None,
        weights: list[np.ndarray],
        num_heads: list[int],
        activation: str = "gelu",
        norm: str = "layer_norm",
        eps: float = 1e-12,
        multiprocessors: int = 108,
    ) -> np.ndarray:
        """All layers; `weights` canonical, in the order of `reference.LayerWeights`."""
        batch, length, size = hidden_states.shape
        layers = []
        for index, heads in enumerate(num_heads):
            tensors = weights[12 * index : 12 * index + 12]
            head_size = tensors[1].shape[0] // (3 * heads) if heads else 0
            width = tensors[7].shape[0]
            if dtype != "float32":
                tensors = [self.prepack(tensor) if tensor.ndim == 2 else tensor for tensor in tensors]
            layers.append((heads, head_size, width, [self._at(tensor) for tensor in tensors]))
        output = empty(hidden_states.shape, dtype)
        call = (
            *(DTYPES.index(dtype), batch, length, size, layers, ACTIVATIONS.index(activation), NORMS.index(norm), eps),
            *(self._at(mask), self._at(hidden_states), self._at(output), multiprocessors),
        )
        scratch = empty(self.module.encoder(*call, 0) // 4, "float32")
        self._at(scratch)
        self.module.watch(sorted({(address(buffer), buffer.nbytes) for buffer in self.buffers}))
        self.module.encoder(*call, address(scratch))
        self.module.watch([])
        return output

    def traffic_of_encoder(self, dtype: str, hidden_states: np.ndarray, *rest: Any, **more: Any) -> list[dict]:
        """The launches of `encoder`, with the distinct bytes that each has `read` and `written` (mode "races")."""
        self.encoder(dtype, hidden_states, *rest, **more)
        launches = [launch for launch in self.launches() if "prepack" not in launch["kernel"]]
        for launch in launches:
            launch["read"], launch["written"] = map(sum, zip(*launch["traffic"], strict=True))
        return launches

    def plan(self, rows: int, out_features: int, in_features: int, multiprocessors: int, may_split: bool) -> tuple:
        """(rows, columns) of a block's tile, and splits."""
        return self.module.plan_linear(rows, out_features, in_features, multiprocessors, may_split)


@functools.cache
def _load(library: Path) -> Any:
    spec = importlib.util.spec_from_file_location("emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(calls: list[tuple[str, dict[str, Any]]], mode: str = "plain", csrc: Path = CSRC, **options: Any) -> list[Any]:
    """Call methods of `Kernels` in a child process.

    Returns: for each call (its result, its launches), or a str that says what went wrong. What kills the process (a
    sanitizer does) is an error of the call it was at, and of those after it.
    """
    build(mode, csrc)
    environment = dict(os.environ)
    if mode == "address":
        name = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment |= {"LD_PRELOAD": name.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        request = pickle.dumps((calls, mode, csrc, options, results))
        child = subprocess.run(
            [sys.executable, "-m", "cuda_emulator"],
            input=request,
            cwd=HERE.parent,
            env=environment,
            capture_output=True,
        )
        answers = []
        if results.exists():
            with results.open("rb") as file:
                while file.peek(1):
                    answers.append(pickle.load(file))
    if len(answers) < len(calls):
        lines = child.stderr.decode(errors="replace").splitlines()
        telling = [line for line in lines if "ERROR" in line or "runtime error" in line] or lines[-3:]
        answers += [f"the process ended with {child.returncode}: {' '.join(telling[:2])}"] * (len(calls) - len(answers))
    return answers


def serve() -> None:
    """What the child process does."""
    calls, mode, csrc, options, results = pickle.load(sys.stdin.buffer)
    with open(results, "ab") as file:
        for name, arguments in calls:
            kernels = Kernels(mode, csrc, **options)
            try:
                answer: Any = (getattr(kernels, name)(**arguments), kernels.launches())
            except RuntimeError as error:
                answer = str(error)
            pickle.dump(answer, file)
            file.flush()
