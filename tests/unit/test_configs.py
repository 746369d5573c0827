"""Every configuration that is shipped: commented, parsed, built at full size without numbers, and run for one step."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from config_files import (
    DEAD,
    FAMILIES,
    FILES,
    NUM_PARAMETERS,
    OVERLAYS,
    ROOT,
    WHOLE,
    images_of_step,
    label,
    lively,
    parsed,
    small,
    stacked,
    strategy_of,
    write_prompts,
)
from run_files import column

from calibri_lightning import read_calibration
from calibri_lightning.__main__ import main
from calibri_lightning.assembly import CalibrationConfig
from calibri_lightning.bench.models import RANDOM_MODELS
from calibri_lightning.bench.random_models import build_random
from calibri_lightning.calibration import Layout, SiteOptions, build_layout, find_sites
from calibri_lightning.cli import parse_fit

IMAGES = re.compile(r"([\d,]+) training images")


each_file = pytest.mark.parametrize("file", FILES, ids=label)
each_whole = pytest.mark.parametrize("file", WHOLE, ids=label)
each_full_size = pytest.mark.parametrize(
    "file", [file for file in WHOLE if FAMILIES[file.parent.name].recipe is not None], ids=label
)


def leaves(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """Path, line and text of every value that is no mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from leaves(value, (*path, key.value))
    else:
        yield path, node.end_mark.line, str(getattr(node, "value", ""))


@each_file
def test_every_key_has_a_comment_and_defaults_in_comments_are_right(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0].startswith("# "), "a first line that says what it is"
    assert any(f"--config configs/{label(file)}" in line for line in lines if line[0] == "#"), "the command"
    found = list(leaves(yaml.compose(text)))
    assert found
    for path, number, _ in found:
        _, mark, comment = lines[number].partition(" # ")
        assert mark, f"{'.'.join(path)} has no comment"
        assert len(comment.split()) > 1
        said = re.search(r"\bdefault (-?\d+(?:\.\d+)?|auto|true|false|null)\b", comment)
        if said:
            default = default_of(file, path)
            if default is not ...:
                assert yaml.safe_load(said[1]) == default, f"{'.'.join(path)}: the default is {default}"


@functools.cache
def unconfigured(backbone: str, strategy: str) -> dict[str, Any]:
    named = [f"--model.backbone={backbone}", f"--model.strategy={strategy}", "--model.rewards={shapes: 1.0}"]
    return parse_fit([*named, "--model.backbone.pretrained=x"])


def default_of(file: Path, path: tuple[str, ...]) -> Any:
    """What a key is without the configuration; ... where the model or the reward decides."""
    model = parsed(file)["model"]
    bare = unconfigured(model["backbone"]["class_path"], model["strategy"]["class_path"])
    for name in path:
        if not hasattr(bare, "get") or name not in bare:
            return ...
        bare = bare[name]
    resolved_later = bare is None and path[-1] in ("popsize", "height", "width", "embedded_guidance")
    return ... if resolved_later or path[-1] == "device" else bare


@each_file
def test_it_parses_and_names_what_it_is_for(file: Path) -> None:
    config = parsed(file)
    model = config["model"]
    if file in OVERLAYS:
        assert set(model["rewards"]) == {"my_rewards:HPSv3", "pickscore"}
        return
    family = FAMILIES[file.parent.name]
    assert model["backbone"]["init_args"]["pretrained"] == family.pretrained
    if family.recipe is not None:
        assert config["name"] == f"{file.parent.name}_{file.stem}", "runs of different files have folders of their own"
        assert dict(model["rewards"]) == {"pickscore": 1.0}
        assert (model["num_steps"], model["rows_per_forward"], model["overlap_scoring"]) == (15, "auto", True)


@functools.cache
def full_size(recipe: str, side: int) -> Any:
    return build_random(RANDOM_MODELS[recipe], "bfloat16", torch.device("meta"), None, side)


def full_layout(file: Path) -> Layout:
    """What theta means on the model that the configuration names, before the probe."""
    config, family = parsed(file)["model"], FAMILIES[file.parent.name]
    given = config["backbone"]["init_args"]
    assert family.recipe is not None
    assert given["height"] == given["width"]
    backbone = full_size(family.recipe, given["height"])
    module, _, name = config["backbone"]["class_path"].rpartition(".")
    assert isinstance(backbone, getattr(importlib.import_module(module), name))
    if given.get("embedded_guidance") is not None:
        assert backbone.takes_guidance
        assert backbone.stock_guidance == given["embedded_guidance"]
    calibration = CalibrationConfig(**config["calibration"])
    backbone.check_members(calibration.members, calibration.weight_mode)
    sites = find_sites(backbone.transformer, SiteOptions(calibration.cross_attention, calibration.split_fused))
    guidance = backbone.plain_guidance(calibration.guidance_scale)
    return build_layout(sites, calibration.granularity, calibration.members, guidance, calibration.weight_mode)


@each_full_size
def test_the_full_size_model_has_as_many_parameters_as_the_file_says(file: Path) -> None:
    layout = full_layout(file)
    assert layout.num_parameters == NUM_PARAMETERS[label(file)]
    head = " ".join(line.removeprefix("# ") for line in file.read_text(encoding="utf-8").splitlines() if line[0] == "#")
    assert f"{layout.num_parameters} parameters" in head
    images = parsed(file)["trainer"]["max_steps"] * strategy_of(file).num_cells(layout.num_parameters)
    assert [int(number.replace(",", "")) for number in IMAGES.findall(head)] == [images]


def test_all_full_size_configurations_are_counted() -> None:
    assert set(NUM_PARAMETERS) == {label(file) for file in WHOLE if FAMILIES[file.parent.name].recipe is not None}


def test_the_page_lists_what_the_files_are() -> None:
    rows = [
        line for line in (ROOT / "docs" / "configs.md").read_text(encoding="utf-8").splitlines() if line[:3] == "| `"
    ]
    for name, parameters in NUM_PARAMETERS.items():
        folder, _, file = name.partition("/")
        [row] = [row for row in rows if f"`{folder}/" in row and re.search(rf"[`/]{file}`", row)]
        path = ROOT / "configs" / name
        images = parsed(path)["trainer"]["max_steps"] * strategy_of(path).num_cells(parameters)
        cells = [cell.strip() for cell in row.split("|")]
        assert (cells[2].split(",")[0], cells[3]) == (str(parameters), f"{images:,}"), name


PUBLISHED = {"flux1_dev/paper_block.yaml": (200, 16), "flux1_dev/paper_layer.yaml": (410, 17)}
PUBLISHED |= {
    "flux1_dev/paper_gate.yaml": (960, 18),
    "sd35_medium/paper.yaml": (2280, 20),
    "qwen_image/paper.yaml": (630, 24),
}


@pytest.mark.parametrize("file", [file for file in WHOLE if file.stem.startswith("paper")], ids=label)
def test_the_papers_settings_are_the_papers(file: Path) -> None:
    config = parsed(file)
    model, strategy = config["model"], config["model"]["strategy"]["init_args"]
    assert config["seed_everything"] == 42
    assert model["strategy"]["class_path"].endswith(".CMAES")
    assert (strategy["preset"], strategy["bucket_size"], strategy["sigma0"]) == ("official", 16, None)
    assert model["calibration"]["weight_mode"] == "raw"
    assert (model["backbone"]["init_args"]["height"], model["num_steps"]) == (512, 15)
    assert config["trainer"]["val_check_interval"] == 10
    if label(file) in PUBLISHED:
        iterations, popsize = PUBLISHED[label(file)]
        assert config["trainer"]["max_steps"] == iterations
        assert strategy_of(file).resolve(NUM_PARAMETERS[label(file)], None, {})["popsize"] == popsize
        guided = model["calibration"]["members"] == "cfg"
        assert guided == (file.parent.name in ("sd35_medium", "qwen_image"))
        assert not guided or model["calibration"]["guidance_scale"] == 7.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        if not (root / family).is_dir():
            lively(FAMILIES[family].tiny()).save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts where the configurations expect them, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    return tmp_path


@each_whole
@pytest.mark.usefixtures("no_plots")
def test_it_takes_a_step_on_a_tiny_model_of_its_class(file: Path, models: Callable[[str], Path], prompts: Path) -> None:
    folder = file.parent.name
    assert main(small(file, models(folder), '--model.rewards={"tiny_rewards:redness": 1.0}')) == 0
    [path] = (prompts / "runs").glob("*/version_0")
    calibration = read_calibration(path / "calibration.json")
    transformer = FAMILIES[folder].tiny().transformer
    config = CalibrationConfig(**parsed(file)["model"]["calibration"])
    sites = find_sites(transformer, SiteOptions())
    everything = build_layout(sites, config.granularity, config.members, 2.0, config.weight_mode).num_parameters
    # What the probe drops on the tiny model, it drops on the full-size one, whose last block is no other.
    members = 2 if config.members == "cfg" else 1
    dead = members * DEAD.get(folder, 0) if config.granularity == "gate" else 0
    assert len(calibration.values) == everything - dead
    assert column(path, "train/images") == [images_of_step(file, len(calibration.values))]
    assert (path / "summary.json").is_file(), "the test at the end"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (False, ["'prompts/train.txt' does not exist", "docs/configs.md"]),
        (True, ["'my_rewards:HPSv3' cannot be imported", "PYTHONPATH"]),
    ],
)
def test_absent_prompts_and_rewards_come_with_a_hint_before_a_model_is_fetched(
    given: bool, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if given:
        write_prompts(tmp_path)
    assert main(["fit", *(f"--config={path}" for path in stacked(OVERLAYS[0]))]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for word in words:
        assert word in error
    assert (ROOT / "docs" / "configs.md").is_file()
