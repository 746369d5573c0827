from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "calibri_lightning"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MAY_IMPORT_LIGHTNING = {
    *("module.py", "data.py", "cli.py", "checkpoint.py"),
    *("launch/stopping.py", "launch/guard.py", "sharding/strategy.py"),
}
NUMERIC_CORES = {"search.py", "ledger.py", "cma_core.py", "pair_core.py"}
HEAVY = {"datasets", "diffusers", "matplotlib", "peft", "pyarrow", "tensorboard", "transformers"}


def imported(node: ast.AST) -> set[str]:
    """The top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {(node.module or "").partition(".")[0]}
    return set()


def at_import_time(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        skipped = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        )
        if not skipped:
            pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("name", NAMES)
def test_every_module_imports(name: str) -> None:
    module = ".".join(["calibri_lightning", *Path(name).with_suffix("").parts])
    importlib.import_module(module.removesuffix(".__init__"))


@pytest.mark.parametrize("name", NAMES)
def test_lightning_stays_in_its_rooms(name: str) -> None:
    parts = Path(name).parts
    allowed = name in MAY_IMPORT_LIGHTNING or (parts[0] == "strategies" and parts[-1] not in NUMERIC_CORES)
    tree = ast.parse((PACKAGE / name).read_text())
    found = set().union(*(imported(node) for node in ast.walk(tree)))
    assert "pytorch_lightning" not in found, "two copies of every class: import lightning.pytorch"
    assert allowed or "lightning" not in found


@pytest.mark.parametrize("name", NAMES)
def test_heavy_packages_are_imported_inside_functions(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text())
    assert not HEAVY & set().union(*(imported(node) for node in at_import_time(tree)))


def pickle_uses(tree: ast.Module) -> set[str]:
    """How a module uses pickle: its attributes by name, and the module itself where it is used in any other way."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "pickle"]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.value in names]
    aliases = [node for node in ast.walk(tree) if isinstance(node, ast.alias) and node.name.startswith("pickle.")]
    from_it = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "pickle"]
    renamed = [node for node in ast.walk(tree) if isinstance(node, ast.alias) and node.name == "pickle" and node.asname]
    other = len(names) != len(attributes) or aliases or from_it or renamed
    return {ast.unparse(node) for node in attributes} | ({"pickle"} if other else set())


@pytest.mark.parametrize(
    ("code", "uses"),
    [
        ("import pickle\npickle.dumps(1)", {"pickle.dumps"}),
        ("import pickle\npickle.dumps(1), pickle.loads(b'')", {"pickle.dumps", "pickle.loads"}),
        ("import pickle\npickle.dumps(1)\nf = pickle", {"pickle.dumps", "pickle"}),
        ("import pickle\nfrom pickle import loads\npickle.dumps(1)", {"pickle.dumps", "pickle"}),
        ("import pickle as p\np.loads(b'')", {"pickle"}),
    ],
)
def test_uses_of_pickle_are_found(code: str, uses: set[str]) -> None:
    assert pickle_uses(ast.parse(code)) == uses


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_unpickled(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text())
    found = set().union(*(imported(node) for node in ast.walk(tree)))
    # One module writes pickles, for servers that read nothing else, and reads their replies itself; one counts what
    # torch would send. They may call `pickle.dumps`, and touch nothing else in there.
    allowed = {"pickle"} if name in ("remote/plain_pickle.py", "bench/simulation.py") else set()
    assert not found & ({"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"} - allowed)
    if allowed:
        assert pickle_uses(tree) == {"pickle.dumps"}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            keywords = [ast.unparse(keyword) for keyword in call.keywords]
            assert "weights_only=True" in keywords or ast.unparse(call.func) != "torch.load"
            assert "weights_only=False" not in keywords


def test_importing_the_package_and_its_maths_needs_no_lightning() -> None:
    code = f"""
import importlib, pkgutil, sys
import calibri_lightning
assert not {{"torch", "numpy", "lightning"}} & set(sys.modules), "importing the package must be instant"
for part in ("calibration", "sampling", "rewards", "backbones", "evaluation", "prompts", "loaders"):
    module = importlib.import_module("calibri_lightning." + part)
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), module.__name__ + "."):
        importlib.import_module(found.name)
heavy = {{"lightning", "pytorch_lightning", *{sorted(HEAVY)}}} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    assert all([s.operator for s in r.specifier] == ["=="] for r in requirements)
    return {canonical(r.name): Version(next(iter(r.specifier)).version) for r in requirements}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    known = pins()
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    requirements = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    for requirement in requirements:
        if requirement.name != PROJECT["name"]:
            assert known[canonical(requirement.name)] in requirement.specifier, requirement


def test_constraints_never_name_a_malicious_lightning() -> None:
    for line in PROJECT["dependencies"]:
        if Requirement(line).name == "lightning":
            specifier = Requirement(line).specifier
            assert not any(version in specifier for version in ("2.6.2", "2.6.3", "2.7.0"))


def test_the_tests_run_with_what_the_readme_installs() -> None:
    readme = (ROOT / "README.md").read_text().split("##")[0]
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in readme
    assert "pip install -c constraints.txt -e . && python -m calibri_lightning fit --config" in readme


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_no_file_is_large() -> None:
    folders = [ROOT / name for name in ("calibri_lightning", "configs", "docs", "tests")]
    sizes = {path: path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 40e6
    weights = PACKAGE / "shapes" / "weights"
    assert sum(size for path, size in sizes.items() if weights in path.parents) <= 12e6
