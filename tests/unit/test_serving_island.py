"""The server's code runs beside old libraries: it imports no model library, and is Python 3.10."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "calibri_lightning"
SERVING = PACKAGE / "serving"
SHARED = ("errors", "commandline")
"""Modules of the package that the server imports, too."""
FILES = [
    *sorted(path for path in SERVING.rglob("*.py") if "scripts" not in path.parts),
    *(PACKAGE / f"{name}.py" for name in SHARED),
]
NEW_IN_3_11 = {
    "asyncio": {"Runner", "TaskGroup", "timeout", "Barrier"},
    "builtins": {"BaseExceptionGroup", "ExceptionGroup"},
    "datetime": {"UTC"},
    "enum": {"StrEnum"},
    "typing": {"LiteralString", "Never", "NotRequired", "Required", "Self", "TypeVarTuple", "Unpack", "assert_never"},
}
NEW_MODULES = {"tomllib"}


def test_it_imports_with_all_model_libraries_blocked() -> None:
    code = f"""
import importlib, pkgutil, sys
for name in ("torch", "transformers", "lightning", "diffusers", "scipy", "requests", "jsonargparse", "peft"):
    sys.modules[name] = None
import calibri_lightning.serving as serving
for found in pkgutil.iter_modules(serving.__path__, serving.__name__ + "."):
    importlib.import_module(found.name)
ours = {{name for name in sys.modules if name.startswith("calibri_lightning.") and ".serving" not in name}}
assert ours <= {{f"calibri_lightning.{{name}}" for name in {SHARED}}}, ours
print(len([name for name in sys.modules if ".serving." in name]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_is_python_3_10(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.TryStar)
        if isinstance(node, ast.ImportFrom):
            assert node.module not in NEW_MODULES
            assert not {alias.name for alias in node.names} & NEW_IN_3_11.get(node.module or "", set())
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & NEW_MODULES
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr not in NEW_IN_3_11.get(node.value.id, set())
        if isinstance(node, ast.Name):
            assert node.id not in NEW_IN_3_11["builtins"]
        # In 3.10, asyncio's and concurrent.futures' timeouts are classes of their own.
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            assert "TimeoutError" not in ast.unparse(node.type).replace("asyncio.TimeoutError", "")
