"""The PTX that nvcc makes of the CUDA kernels, run by an interpreter: the one check that sees the inline assembly.

The emulator notes each launch (grid, shared memory, the bytes of its arguments) without running it; the interpreter
then runs the instructions themselves on the same arrays.
"""

import shutil
import subprocess

import cuda_emulator
import numpy as np
import pytest
from cuda_cases import attention, linear, small_cases
from cuda_emulator import ptx

NVCC = cuda_emulator.CUDA_HOME / "bin/nvcc"
REASON = cuda_emulator.why_not() or ("" if NVCC.exists() else f"needs nvcc, looked for {NVCC}")
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "-")


def compile_kernels(csrc, folder, arch, names=None):
    """Mangled name -> kernel, of all sources or those that are named."""
    sources = [file for file in sorted((csrc / "cuda").glob("*.cu")) if names is None or file.stem in names]
    flags = ["-O3", "-std=c++20", f"-I{csrc}", f"-arch={arch}", "-ptx"]
    compilers = [subprocess.Popen([NVCC, *flags, file, "-o", folder / f"{file.stem}.ptx"]) for file in sources]
    assert [compiler.wait() for compiler in compilers] == [0] * len(sources)
    found = {}
    for file in sources:
        found |= ptx.Module((folder / f"{file.stem}.ptx").read_text()).kernels
    return found


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def kernels(request, tmp_path_factory):
    return compile_kernels(cuda_emulator.CSRC, tmp_path_factory.mktemp(request.param), request.param)


def interpret(kernels, recorded):
    """Run what was recorded, on the arrays that it was given."""
    memory = ptx.Memory(recorded.buffers)
    names = []
    for launch in recorded.launches():
        block = (launch["threads"], 1, 1)
        kernel = kernels[launch["kernel"]]
        ptx.launch(kernel, launch["grid"], block, launch["shared_bytes"], launch["arguments"], memory, seed=1)
        names.append(launch["kernel"])
    return names


def test_every_instantiation(kernels):
    ran = set()
    for case in small_cases():
        recorded = cuda_emulator.Kernels(only_record=True)
        result = getattr(recorded, case.method)(**case.arguments)
        ran.update(interpret(kernels, recorded))
        if case.arguments.get("activation") == "sums":  # the method has summed them before they were there
            result = recorded.buffers[-1].sum(0, dtype="float64")
        case.check(result)
    for dtype in ("float32", "float16", "bfloat16"):
        recorded = cuda_emulator.Kernels(only_record=True)
        mask = np.random.default_rng(0).random((3, 40)) < 0.5
        padded = np.arange(3 * 40 * 9).reshape(3, 40, 9).astype(dtype if dtype != "bfloat16" else np.uint16)
        cu_seqlens, tokens, positions, output = recorded.gather(dtype, padded, mask)
        ran.update(interpret(kernels, recorded))
        count = mask.sum()
        assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum().tolist()]
        assert positions[:count].tolist() == np.flatnonzero(mask).tolist()
        assert tokens[:count].tobytes() == padded[mask].tobytes()
        assert not output[~mask].any()
    assert ran == set(kernels)  # every kernel that nvcc made


#: What is broken in device.cuh's assembly, where the emulator can't look: what stands there, and what instead.
BUGS = {
    "the halves of b are swapped": ("{%8, %9}", "{%9, %8}"),
    "rows of a are swapped": ("{%4, %5, %6, %7}", "{%5, %4, %6, %7}"),
    "sums are not accumulated where they were": ('"{%0, %1, %2, %3};"', '"{%2, %3, %0, %1};"'),
    "values are not transposed": ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
    "a copy is of 8 bytes": ("cp.async.cg.shared.global [%0], [%1], 16;", "cp.async.ca.shared.global [%0], [%1], 8;"),
    "a wait is for one group less": ("wait_group %0;", "wait_group %0 + 1;"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_the_assembly_is_caught(name, tmp_path):
    text, broken = BUGS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(cuda_emulator.CSRC, csrc)
    header = csrc / "cuda" / "device.cuh"
    source = header.read_text()
    assert text in source, "the bug no longer fits the source: plant it anew"
    header.write_text(source.replace(text, broken))
    broken_kernels = compile_kernels(csrc, tmp_path, "sm_80", ("packed_linear", "pruned_attention"))
    cases = [linear("float16", (32, 64), 3, 200, 40), attention("float16", (70,), 1, 32)]
    wrong = 0
    for case in cases:
        recorded = cuda_emulator.Kernels(only_record=True)
        result = getattr(recorded, case.method)(**case.arguments)
        try:
            interpret(broken_kernels, recorded)
            case.check(result)
        except (AssertionError, ptx.Fault):
            wrong += 1
    assert wrong > 0
