"""Scripts that serve models of other environments: their headers, their options, and what they make of answers.

The libraries themselves cannot be installed here; `script_stubs` stands in for the calls that they document.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from script_stubs import MODULES, served, write_stubs

from calibri_lightning.serving.pictures import pack
from calibri_lightning.serving.protocol import Item, PromptText, ScoreRequest
from calibri_lightning.serving.run import script_main
from calibri_lightning.serving.scorer import Scorer
from calibri_lightning.serving.scripts import shared

FOLDER = Path(shared.__file__).parent
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if "# /// script" in path.read_text())
NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
NEEDED = {"deqa": ["--revision", "a" * 40], "geneval": ["--detector", "mask2former.pth"]}
"""Options that have no default."""
_BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def header(script: Path) -> dict[str, Any]:
    """The metadata of a script, read as PEP 723 has it."""
    [match] = list(_BLOCK.finditer(script.read_text()))
    lines = match["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def test_there_is_one_for_each_model() -> None:
    assert NAMES == ["deqa", "geneval", "hpsv3", "imagereward", "q_align"]


@each_script
def test_every_library_is_pinned_once_and_the_servers_own_are_there(script: Path) -> None:
    requirements = [Requirement(line) for line in header(script)["dependencies"]]
    names = [requirement.name for requirement in requirements]
    assert len(set(names)) == len(names)
    assert {"fastapi", "uvicorn", "pydantic", "prometheus-client", "numpy", "pillow", "torch"} <= set(names)
    for requirement in requirements:
        [specifier] = requirement.specifier
        assert specifier.operator == "=="
        assert "*" not in specifier.version


@each_script
def test_it_is_python_of_its_environment(script: Path) -> None:
    versions = SpecifierSet(header(script)["requires-python"])
    minors = [minor for minor in range(8, 15) if f"3.{minor}.9" in versions]
    assert minors == ([10] if script.stem == "geneval" else [11])


@pytest.mark.parametrize("file", sorted(FOLDER.parent.rglob("*.py")), ids=lambda path: path.name)
def test_what_the_scripts_import_is_python_3_10(file: Path) -> None:
    ast.parse(file.read_text(), feature_version=(3, 10))


@each_script
def test_libraries_are_imported_when_the_model_is_loaded_and_not_before(script: Path) -> None:
    """Else --help would need the weights' whole environment, and a wrong option would be told minutes late."""
    tree = ast.parse(script.read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    light = {"numpy", "PIL", "calibri_lightning", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in names} <= light


def isolated(code: str, *arguments: str, **environment: str) -> str:
    """Runs code in a process that has the installed libraries and nothing of this checkout on its path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=kept | environment, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_protocol_needs_three_libraries_and_no_install(tmp_path: Path) -> None:
    """As in a script's environment: its folder is first on the path, the package is not installed."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
import _package
import calibri_lightning.serving.protocol, calibri_lightning.serving.pictures, calibri_lightning.serving.scorer
import importlib.util, json
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
found = importlib.util.find_spec("hpsv3")
print(json.dumps([calibri_lightning.__file__, sorted(new), sys.argv[1] in sys.path, found and found.origin]))
"""
    file, new, on_path, hpsv3 = json.loads(isolated(code, str(FOLDER)))
    assert Path(file) == FOLDER.parents[1] / "__init__.py", "the package that the script belongs to"
    assert not on_path
    assert hpsv3 is None, "the script is not taken for the library"
    libraries = {name for name in new if not name.startswith("_")} - {"calibri_lightning"}
    dependencies = {"pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert libraries - dependencies == {"pydantic", "numpy", "PIL"}


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scorer]]:
    """A script's scorer, made from a command line; its libraries are stubs."""

    def made(name: str, *words: str) -> Scorer:
        monkeypatch.syspath_prepend(str(write_stubs(name, tmp_path)))
        for module in MODULES:
            monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        return parse(name, "--device", "cpu", *words)

    yield made
    for module in MODULES:
        sys.modules.pop(module, None)


def parse(name: str, *words: str) -> Scorer:
    module = importlib.import_module(f"calibri_lightning.serving.scripts.{name}")
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    made: Scorer = module.make(parser.parse_args([*NEEDED.get(name, []), *words]))
    return made


def grey(*levels: int, side: int = 8) -> list[np.ndarray]:
    return [np.full((side, side, 3), level, np.uint8) for level in levels]


def prompts(*texts: str) -> list[PromptText]:
    return [PromptText(text=text) for text in texts]


def test_hpsv3_gives_the_mean_and_tells_the_uncertainty(scorer: Callable[..., Scorer]) -> None:
    made = scorer("hpsv3", "--weights", "HPSv3.safetensors")
    info = made.load()
    assert (info.name, info.extra_names, info.pixels) == ("hpsv3", ["hpsv3_sigma"], "uint8")
    assert info.revision == "HPSv3.safetensors, hpsv3 1.0.0"
    texts = ["x" * number for number in range(6)]
    scores = made.score(grey(0, 1, 2, 3, 4, 5), prompts(*texts))
    assert scores == {"hpsv3": [0, 2, 4, 6, 8, 10], "hpsv3_sigma": [9.0] * 6}
    # Floats are rounded as a file would round them.
    half = [np.full((8, 8, 3), 0.5 / 255 + 1e-4, np.float32)]
    assert made.score(half, prompts(""))["hpsv3"] == [1]


def test_a_file_of_the_hub_has_a_commit() -> None:
    assert shared.commit_of("models--a--b/snapshots/0123abc/x.safetensors") == "0123abc"
    assert shared.commit_of("elsewhere/x.safetensors") == "x.safetensors"


def test_imagereward_scores_pairs(scorer: Callable[..., Scorer], caplog: pytest.LogCaptureFixture) -> None:
    made = scorer("imagereward")
    info = made.load()
    assert (info.name, info.model, info.revision) == ("imagereward", "ImageReward-v1.0", "image-reward 1.5")
    assert made.score(grey(0, 100, 200), prompts("", "a", "bb")) == {"imagereward": [0.0, 2.0, 4.0]}
    assert made.check(prompts("short", "word " * 36, "word " * 35)) is None
    assert "1 of 3" in caplog.text
    assert "35 tokens" in caplog.text


@pytest.mark.parametrize("name", ["q_align", "deqa"])
def test_code_of_the_hub_runs_at_a_fixed_commit_only(name: str, scorer: Callable[..., Scorer]) -> None:
    made = scorer(name, "--batch-size", "3")
    info = made.load()
    [(repository, given)] = importlib.import_module("transformers").CALLS
    assert info.model == repository == {"q_align": "q-future/one-align", "deqa": "zhiyuanyou/DeQA-Score-Mix3"}[name]
    assert given["trust_remote_code"] is True
    assert re.fullmatch("[0-9a-f]{40}", given["revision"])
    assert given["revision"] == given["code_revision"] == info.revision
    assert given["device_map"] == "cpu"
    assert made.score(grey(64, 128, 192, 255), prompts("", "", "", "")) == {
        name: [1.0, 2.0, 3.0, pytest.approx(255 / 64, rel=1e-3)]
    }


def test_q_align_judges_aesthetics_and_reports_the_other_task(scorer: Callable[..., Scorer]) -> None:
    made = scorer("q_align", "--task", "aesthetics", "--both")
    info = made.load()
    assert info.extra_names == ["q_align_quality"]
    assert "aesthetics" in info.preprocessing
    assert made.score(grey(64), prompts("")) == {"q_align": [1.5], "q_align_quality": [1.0]}


@pytest.mark.parametrize("given", [[], ["--revision", "main"], ["--revision", "d4dad89"]])
def test_deqa_needs_a_commit_from_who_runs_it(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module("calibri_lightning.serving.scripts.deqa")
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(given)
    assert "--revision" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_a_batch_has_a_picture(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("hpsv3", "--batch-size", size)
    assert "no number from 1 up" in capsys.readouterr().err


def scene(dog: tuple[int, int, int] | None, mouse: tuple[int, int, int] | None) -> np.ndarray:
    """A dog on the left, a mouse on the right; the stub's detector sees full blue and full red."""
    picture = np.zeros((40, 40, 3), np.uint8)
    for colour, left in ((dog, 4), (mouse, 24)):
        if colour is not None:
            picture[14:26, left : left + 12] = colour
    return picture


BLUE, RED = (0, 0, 255), (255, 0, 0)
BESIDE = {
    "tag": "position",
    "include": [
        {"class": "computer mouse", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "color": "blue", "position": ["left of", 0]},
    ],
}


def test_geneval_sees_objects_colours_and_places(scorer: Callable[..., Scorer]) -> None:
    made = scorer("geneval", "--batch-size", "2")
    info = made.load()
    assert (info.name, info.revision) == ("geneval", "mmdet 2.28.2")
    images = [scene(BLUE, RED), scene(BLUE, None), scene(None, None)]
    scores = made.score(images, [PromptText(text="x", metadata=BESIDE)] * 3)
    assert scores["geneval_correct"] == scores["geneval_strict"] == [1.0, 0.0, 0.0]
    # Five conditions: two counts, two colours, a place.
    assert scores["geneval"] == [1.0, pytest.approx(2 / 5), 0.0]


def test_geneval_asks_for_more_certainty_when_it_counts(scorer: Callable[..., Scorer]) -> None:
    """The stub is 0.6 sure of mice and 0.95 of dogs; counting needs 0.9, all else 0.3."""
    made = scorer("geneval")
    made.load()
    images = [scene(BLUE, RED)]
    for name, tag, expected in (
        ("computer mouse", "single_object", 1.0),
        ("computer mouse", "counting", 0.0),
        ("dog", "counting", 1.0),
    ):
        metadata = {"tag": tag, "include": [{"class": name, "count": 1}]}
        assert made.score(images, [PromptText(metadata=metadata)])["geneval_correct"] == [expected]


def test_geneval_refuses_prompts_without_its_metadata(scorer: Callable[..., Scorer]) -> None:
    made = scorer("geneval")
    made.load()
    assert made.check([PromptText(text="x", metadata=BESIDE)]) is None
    problem = made.check([PromptText(text="x", metadata=BESIDE), PromptText(text="a dog")])
    assert problem is not None
    assert "'a dog'" in problem
    scores = made.score([scene(BLUE, RED)], prompts("a dog"))
    assert all(math.isnan(value) for [value] in scores.values())


def test_a_script_run_as_a_file_serves(tmp_path: Path) -> None:
    """With the real server; only the library that cannot be installed is a stub."""
    items = [
        Item(picture=pack(image, "raw"), prompt=prompt)
        for image, prompt in zip(grey(7, 8), prompts("a", "bb"), strict=True)
    ]
    body = ScoreRequest(reward="hpsv3", items=items).model_dump_json().encode()
    with served("hpsv3", tmp_path, "--weights", "HPSv3.safetensors") as url:
        request = urllib.request.Request(f"{url}/v1/score", body, {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=30) as answer:
            reply = json.load(answer)
    assert [result["scores"] for result in reply["results"]] == [
        {"hpsv3": 8.0, "hpsv3_sigma": 9.0},
        {"hpsv3": 10.0, "hpsv3_sigma": 9.0},
    ]


@each_script
def test_its_options_stand_beside_those_of_every_server(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"calibri_lightning.serving.scripts.{script.stem}")
    with pytest.raises(SystemExit) as ended:
        script_main(module.make, module.add_options, ["--help"])
    assert ended.value.code == 0
    assert {"--port", "--token-file", "--device"} <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
