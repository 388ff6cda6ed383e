"""The data flows one way: checkpoint -> plan -> packed weights -> modules -> ops -> kernels."""

import ast
from pathlib import Path

import pytest

import packedbert

PACKAGE = Path(packedbert.__file__).parent

#: A module may import those before it, never one after it.
ORDER = (
    "quantization",
    "reference",
    "dispatch",
    "structure",
    "packing",
    "checkpoint",
    "config",
    "triton_kernels",
    "ops",
    "layers",
    "modules",
    "report",
    "patch",
    "calibration",
    "hf",
    "qa",
    "squad",
    "bench",
    "cli",
)


def imports(file: Path) -> set[str]:
    """Names of the package's own modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("packedbert."):
            found.add(node.module.split(".")[1])
    return found & set(ORDER)


def test_every_module_has_its_place():
    assert {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_nothing_imports_backwards(name):
    assert imports(PACKAGE / f"{name}.py") <= set(ORDER[: ORDER.index(name)])


def test_one_place_knows_transformers_hooks():
    """Only hf.py may touch the quantizer registry, so that a change of transformers has one place to be met."""
    users = [file.stem for file in PACKAGE.glob("*.py") if "transformers.quantizers" in file.read_text()]
    assert users == ["hf"]


def test_only_ops_know_torch():
    """Kernels without torch's headers compile in seconds, and can be run alone: emulated, and under sanitizers."""
    csrc = Path(__file__).parents[1] / "csrc"
    if not csrc.is_dir():
        pytest.skip(f"needs the source tree, looked for {csrc}")
    files = [file for file in csrc.rglob("*") if file.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert {file.name for file in files if "<torch/" in file.read_text()} <= {
        *("ops.cpp", "ops_cuda.cpp", "ops_encoder.cpp", "ops_common.h")
    }
