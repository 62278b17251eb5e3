"""Imports run one way, and importing `mone_model` changes nothing in the process."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent

MAY_IMPORT = {
    "mone_common": set(),
    "configs": set(),
    "mone_model": {"mone_common"},
    "data_prep": {"mone_common"},
    "train": {"mone_common", "mone_model", "data_prep"},
    "mone_eval": {"mone_common", "mone_model", "data_prep"},
    "launch": {"mone_common", "mone_model", "mone_eval", "data_prep", "train"},
    "hydra_plugins": {"mone_common", "mone_model", "mone_eval", "data_prep", "train", "launch"},
}
"""Which of our packages each of them may import beside itself."""
CORE_MAY_NOT_IMPORT = {"megatron", "transformers", "vllm", "deepspeed", "wandb", "hydra", "omegaconf"}
"""What `mone_model` may import in `mone_model.megatron`, `mone_model.hf` and `mone_model.vllm` only."""


class Import(NamedTuple):
    """One imported module, and where."""

    module: str
    line: int
    at_start: bool
    """Whether it runs when the importing module is imported: not in a function, not for type checkers only."""


def modules() -> dict[str, Path]:
    """All our modules by their dotted names."""
    found = {}
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """All imports of a module; `from package import module` counts as an import of that module."""

    def walk(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            source = str(node.module)
            if node.level:
                # Exported files import each other where this project is not installed.
                assert path.parent == ROOT / "mone_model/hf", f"{path}:{node.lineno}: a relative import"
                source = f"mone_model.hf.{source}"
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield Import(inner if inner in known else source, node.lineno, at_start)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                yield from walk(statement, False)
            for statement in node.orelse:
                yield from walk(statement, at_start)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for part in ast.iter_child_nodes(node):
                yield from walk(part, at_start and not is_function)

    return walk(ast.parse(path.read_text()), True)


MODULES = modules()
IMPORTS = {name: list(imports_of(path, MODULES)) for name, path in MODULES.items()}
OTHER_LIBRARIES = ("mone_model.megatron.", "mone_model.hf.", "mone_model.vllm.")
"""Packages of `mone_model` that need more than torch."""
CORE = [name for name in MODULES if name.split(".")[0] == "mone_model" and not f"{name}.".startswith(OTHER_LIBRARIES)]


def where(name: str, found: Import) -> str:
    """The import as a line of a report."""
    return f"{MODULES[name].relative_to(ROOT)}:{found.line} imports {found.module}"


def test_every_package_has_a_rule() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {name.split(".")[0] for name in pyproject["tool"]["setuptools"]["packages"]} == set(MAY_IMPORT)


def test_packages_import_in_one_direction() -> None:
    wrong = []
    for name, imports in IMPORTS.items():
        package = name.split(".")[0]
        for found in imports:
            imported = found.module.split(".")[0]
            if imported in MAY_IMPORT.keys() - MAY_IMPORT[package] - {package} or imported in ("tests", "benchmarks"):
                wrong.append(where(name, found))
    assert wrong == []


def test_core_does_not_import_megatron_core() -> None:
    wrong = [
        where(name, found)
        for name in CORE
        for found in IMPORTS[name]
        if found.module.split(".")[0] in CORE_MAY_NOT_IMPORT or f"{found.module}.".startswith(OTHER_LIBRARIES)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["mone_model.hf.", "mone_model.vllm."])
def test_inference_does_not_import_megatron_core(package: str) -> None:
    wrong = [
        where(name, found)
        for name, imports in IMPORTS.items()
        for found in imports
        if f"{name}.".startswith(package) and f"{found.module}.".startswith(("megatron.", "mone_model.megatron."))
    ]
    assert wrong == []


def test_configs_holds_only_yaml() -> None:
    assert {path.suffix for path in (ROOT / "configs").rglob("*") if path.is_file() and path.suffix != ".pyc"} == {
        ".yaml",
        ".py",
    }
    assert list((ROOT / "configs").rglob("*.py")) == [ROOT / "configs/__init__.py"]
    (docstring,) = ast.parse((ROOT / "configs/__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


def test_no_import_circle() -> None:
    graph = {
        name: {found.module for found in imports if found.at_start and found.module in MODULES}
        for name, imports in IMPORTS.items()
    }
    assert {target for targets in graph.values() for target in targets} >= {"mone_model.config", "train.config"}
    TopologicalSorter(graph).prepare()  # CycleError names the modules of a circle


def run_python(program: str, *arguments: str) -> str:
    """What a program prints in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", ["mone_model", "mone_model.config", "mone_model.accounting"])
def test_planning_does_not_import_torch(module: str) -> None:
    program = "import importlib, sys; importlib.import_module(sys.argv[1]); print('torch' in sys.modules)"
    assert run_python(program, module) == "False"


SNAPSHOT = """
import importlib, sys, types
import torch, torch.distributed

owners = {"torch": torch, "torch.Tensor": torch.Tensor, "torch.cuda": torch.cuda, "torch.distributed": torch.distributed}
before = {name: dict(vars(owner)) for name, owner in owners.items()}
for module in sys.argv[2:]:
    importlib.import_module(module)
for name, owner in owners.items():
    after = vars(owner)
    for attribute in before[name].keys() | after.keys():
        if attribute not in before[name]:  # a submodule is an attribute of its package from its first import on
            if not isinstance(after[attribute], types.ModuleType):
                print(f"{name}.{attribute} is new")
        elif attribute not in after or after[attribute] is not before[name][attribute]:
            print(f"{name}.{attribute} is another object")
print(*(f"{module} is imported" for module in sys.argv[1].split(",") if module in sys.modules), sep="\\n")
"""


def test_importing_the_core_changes_nothing() -> None:
    assert {"mone_model", "mone_model.neuron_selection", "mone_model.kernels.cpu.experts"} <= set(CORE)
    unwanted = ",".join(sorted(CORE_MAY_NOT_IMPORT | {"mone_model.megatron"}))
    assert run_python(SNAPSHOT, unwanted, *CORE) == ""
