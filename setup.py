"""Builds packedbert._C: the CPU kernels, and the CUDA kernels where they can be of use.

Environment variables:

PACKEDBERT_CUDA       auto (default): the CUDA kernels are built when a CUDA toolkit is found and torch is a
                      CUDA build of the same major version. 1: they are built, or the build fails. 0: not.
CUDA_HOME, CUDA_PATH  where the toolkit is, if not in /usr/local/cuda or where the nvcc on PATH lies. It needs
                      both bin/nvcc and include/cuda_runtime.h. No GPU is looked for, nor needed.
TORCH_CUDA_ARCH_LIST  the GPU generations to build for; default 8.0;8.6;9.0;10.0;12.0+PTX.
MAX_JOBS              the number of compilers to run at once.
DEBUG                 1: no optimisation, debug symbols.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;8.6;9.0;10.0;12.0+PTX"
# The oldest versions that the built file loads on: torch 2.13 (stable ABI) and Python 3.10 (limited API).
TORCH_TARGET_VERSION = "0x020d000000000000"
PYTHON_LIMITED_API = "0x030A0000"
PYTHON_ABI_TAG = "cp310"


def find_cuda_toolkit() -> tuple[Path | None, list[Path]]:
    """Return the CUDA toolkit (None: not found) and the folders that were looked at."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        folders = [Path(named)]
    else:
        folders = [Path("/usr/local/cuda")]
        if nvcc := shutil.which("nvcc"):
            folders.append(Path(nvcc).resolve().parent.parent)
    for folder in folders:
        # An nvcc on PATH may be a wrapper script that lies far from its headers: both have to be there.
        if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists():
            return folder, folders
    return None, folders


def major_version(toolkit: Path) -> str:
    """Return the major version of a toolkit, "13" say."""
    text = subprocess.check_output([toolkit / "bin/nvcc", "--version"], text=True)
    match = re.search(r"release (\d+)\.", text)
    if not match:
        raise SystemExit(f"packedbert: no version in the output of {toolkit}/bin/nvcc --version:\n{text}")
    return match.group(1)


def choose_toolkit() -> Path | None:
    """Print what to build; return the toolkit for the CUDA kernels, None for a build without them."""
    wish = os.environ.get("PACKEDBERT_CUDA") or "auto"
    if wish not in ("auto", "1", "0"):
        raise SystemExit(f"packedbert: PACKEDBERT_CUDA: expected auto, 1 or 0, got {wish!r}")
    torch_cuda = torch.version.cuda
    toolkit, folders = (None, []) if wish == "0" else find_cuda_toolkit()
    looked = f"no bin/nvcc with include/cuda_runtime.h in {', '.join(map(str, folders))}"

    if wish == "0":
        reason = "PACKEDBERT_CUDA=0"
    elif toolkit is None:
        reason = looked
        if wish == "1":
            raise SystemExit(f"packedbert: PACKEDBERT_CUDA=1, but {looked}; set CUDA_HOME to the toolkit")
    elif wish == "1":
        reason = "PACKEDBERT_CUDA=1"
    elif torch_cuda is None:
        toolkit, reason = None, f"torch {torch.__version__} is a CPU build"
    elif (major := major_version(toolkit)) != torch_cuda.split(".")[0]:
        toolkit, reason = None, f"{toolkit} has CUDA {major}, torch was built with {torch_cuda}"
    else:
        reason = f"torch was built with CUDA {torch_cuda}"
    kernels = f"CPU and CUDA kernels, with {toolkit}" if toolkit else "CPU kernels only"
    print(f"packedbert: building {kernels} ({reason})", flush=True)
    return toolkit


def native_extension(toolkit: Path | None) -> Extension:
    """Return packedbert._C, with the CUDA kernels if there is a toolkit for them."""
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    optimise = ["-O0", "-g"] if debug else ["-O3"]
    cxx = [
        *optimise,
        *([] if debug else ["-g0"]),  # Python's own flags may ask for debug symbols
        "-std=c++20",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]
    nvcc = [*optimise, "-std=c++20", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
    sources = sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))
    include_dirs = [ROOT / "csrc"]
    library_dirs: list[Path] = []
    libraries: list[str] = []
    if toolkit:
        # cpp_extension guesses the toolkit when it is imported, and does not look at all beside a CPU torch.
        cpp_extension.CUDA_HOME = str(toolkit)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        cxx.append("-DPACKEDBERT_CUDA")
        sources += sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")])
        include_dirs.append(toolkit / "include")
        library_dirs = [folder for folder in (toolkit / "lib64", toolkit / "lib") if folder.is_dir()]
        # The static runtime: the file then loads on machines without CUDA too. It shares the device context,
        # and with it memory and streams, with torch's copy of the runtime.
        libraries = ["cudart_static", "dl", "rt", "pthread"]
    cpp_extension.min_supported_cpython = PYTHON_LIMITED_API  # BuildExtension defines Py_LIMITED_API as this
    return cpp_extension.CppExtension(
        "packedbert._C",
        [str(source.relative_to(ROOT)) for source in sources],
        include_dirs=[str(folder) for folder in include_dirs],
        library_dirs=[str(folder) for folder in library_dirs],
        libraries=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        depends=[str(header.relative_to(ROOT)) for header in sorted(ROOT.glob("csrc/**/*.*h"))],
        py_limited_api=True,
    )


setup(
    ext_modules=[native_extension(choose_toolkit())],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": PYTHON_ABI_TAG}},
)
