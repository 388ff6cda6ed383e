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
    "prepack",
    "ops",
    "layers",
    "shortcut",
    "modules",
    "heads",
    "report",
    "patch",
    "calibration",
    "hf",
    "qa",
    "squad",
    "examples",
    "bench",
    "cost",
    "prune",
    "recover",
    "summary",
    "charts",
    "report_page",
    "cli",
)


def files(name: str) -> list[Path]:
    """The file of a module, or all of a package."""
    return [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else sorted((PACKAGE / name).glob("*.py"))


def imports(file: Path) -> set[str]:
    """Names of the package's own modules that a file imports, at its top or inside functions."""
    level = len(file.relative_to(PACKAGE).parents)  # dots of a relative import that lead to the package
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("packedbert."):
            found.add(node.module.split(".")[1])
    return found & set(ORDER)


def test_every_module_has_its_place():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_nothing_imports_backwards(name):
    assert files(name)
    for file in files(name):
        assert imports(file) <= set(ORDER[: ORDER.index(name)])


def test_one_place_knows_transformers_hooks():
    """Only hf.py may touch the quantizer registry, so that a change of transformers has one place to be met."""
    users = [file.stem for file in PACKAGE.rglob("*.py") if "transformers.quantizers" in file.read_text()]
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
