"""The documentation holds together: links and anchors, examples that are data, and the reference of the API."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from config_files import ROOT
from documents import API, PAGES, Block, anchors, blocks, links, prose
from site_models.released import FULL_SIZES

import calibri_lightning
from calibri_lightning.__main__ import COMMANDS

HAND_WRITTEN = [page for page in PAGES if API not in page.parents]


def of_language(language: str) -> list[Block]:
    return [block for page in HAND_WRITTEN for block in blocks(page) if block.language == language]


def test_every_link_and_anchor_leads_somewhere() -> None:
    lost = []
    for page in PAGES:
        for target in links(page):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                lost.append(f"{page.relative_to(ROOT)}: {target}")
    assert not lost


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert {page for page in HAND_WRITTEN if page not in (index, ROOT / "README.md")} <= listed
    assert "docs/README.md" in set(links(ROOT / "README.md"))


def test_every_command_is_named_on_the_front_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if not re.search(rf"calibri_lightning {name}\b|`{name}`", text)]
    assert not missing


def test_commands_in_running_text_exist() -> None:
    for page in PAGES:
        for module, word in re.findall(r"`python -m (calibri_lightning\S*)((?: [^`]*)?)`", prose(page)):
            assert module.startswith("calibri_lightning.") or not word or word.split()[0] in COMMANDS, (page, word)
        for script in re.findall(r"`python (docs/\S+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), (page, script)


def names_it_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


@pytest.mark.parametrize("block", of_language("python"), ids=lambda block: block.place)
def test_python_compiles_and_imports_what_exists(block: Block) -> None:
    for module, name in names_it_imports(ast.parse(block.text)):
        found = importlib.import_module(module)
        assert not name or hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), name


@pytest.mark.parametrize("block", of_language("json"), ids=lambda block: block.place)
def test_json_is_json(block: Block) -> None:
    for line in block.text.splitlines():
        json.loads(line)


@pytest.mark.parametrize("block", of_language("yaml"), ids=lambda block: block.place)
def test_yaml_is_a_part_of_a_configuration(block: Block) -> None:
    """Values are checked where a page's command uses them; a name that no run has is found here."""
    given: dict[str, Any] = yaml.safe_load(block.text)
    top = {"model", "data", "trainer", "name", "seed_everything"}
    assert given.keys() <= top or given.keys() <= {"backbone", "rewards", "strategy", "calibration"}
    model = given.get("model", given if "model" not in given and not given.keys() & top else {})
    arguments = ast.parse((ROOT / "calibri_lightning" / "module.py").read_text(encoding="utf-8"))
    [init] = [n for n in ast.walk(arguments) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    assert model.keys() <= {argument.arg for argument in init.args.args}


def test_languages_of_blocks_are_known() -> None:
    """A block of another language would be checked by nobody."""
    known = {"bash", "python", "yaml", "json", ""}
    assert {block.language for page in PAGES for block in blocks(page)} <= known


def load_builder() -> Any:
    path = ROOT / "docs" / "build_api.py"
    spec = importlib.util.spec_from_file_location("build_api", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["build_api"] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date() -> None:
    made = load_builder().build()
    written = {file.name: file.read_text(encoding="utf-8") for file in API.glob("*.md")}
    stale = sorted(name for name in made.keys() | written.keys() if made.get(name) != written.get(name))
    assert not stale, "run: python docs/build_api.py"


def test_the_reference_has_all_that_the_package_exports() -> None:
    index = (API / "README.md").read_text(encoding="utf-8")
    missing = [name for name in calibri_lightning.__all__ if f"**[{name}]" not in index]
    assert not missing


def test_numbers_of_scales_are_those_of_the_table() -> None:
    page = (ROOT / "docs" / "granularity.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    counts = {size.name: tuple(size.counts) for size in FULL_SIZES}
    said = {row[0]: tuple(int(cell.split()[0]) for cell in row[1:]) for row in rows if row[0] in counts}
    assert len(said) == 9
    assert said == {name: counts[name] for name in said}
