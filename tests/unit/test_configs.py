"""Every configuration that is shipped: commented, parsed, built at full size without numbers, and run for one step."""

from __future__ import annotations

import functools
import importlib
import json
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
    SHRUNK_IMAGES,
    WHOLE,
    forwards_per_picture,
    has_gradients,
    images_per_step,
    label,
    lively,
    parsed,
    small,
    stacked,
    strategy_of,
    takes_turns,
    write_prompts,
)
from run_files import column

from calibri_lightning import read_calibration
from calibri_lightning.__main__ import main
from calibri_lightning.adapters.files import write_adapter
from calibri_lightning.adapters.lora import LoraOptions, add_lora, lora_parameters, remove_lora
from calibri_lightning.assembly import CalibrationConfig
from calibri_lightning.bench.models import RANDOM_MODELS
from calibri_lightning.bench.random_models import build_random
from calibri_lightning.calibration import Layout, SiteOptions, build_layout, find_sites
from calibri_lightning.cli import parse_fit

IMAGES = re.compile(r"([\d,]+) training images")


REWARDS = {"hpsv3": {"hpsv3", "pickscore"}, "judge": {"vqascore"}, "several": {"pickscore", "aesthetic"}}


each_file = pytest.mark.parametrize("file", FILES, ids=label)
each_whole = pytest.mark.parametrize("file", WHOLE, ids=label)
TRAINED = [file for file in WHOLE if has_gradients(file)]
STACKED = [file for file in WHOLE if file.stem == "calibri_on_flow_grpo"]
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
        assert set(model["rewards"]) == REWARDS[file.stem]
        return
    family = FAMILIES[file.parent.name]
    assert model["backbone"]["init_args"]["pretrained"] == family.pretrained
    if family.recipe is not None:
        assert config["name"] == f"{file.parent.name}_{file.stem}", "runs of different files have folders of their own"
        assert dict(model["rewards"]) == {"pickscore": 1.0}
        assert (model["rows_per_forward"], model["overlap_scoring"]) == ("auto", True)
        assert has_gradients(file) or model["num_steps"] == 15
        # Units of policy gradients are the strategy's own.
        assert model["balance_over"] == (1 if has_gradients(file) else 24)


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


def full_lora(file: Path) -> int:
    """Parameters of the LoRA on the model that the configuration names."""
    full_layout(file)
    config, family = parsed(file)["model"], FAMILIES[file.parent.name]
    assert family.recipe is not None
    transformer = full_size(family.recipe, config["backbone"]["init_args"]["height"]).transformer
    try:
        add_lora(transformer, LoraOptions(**config["lora"]), 0)
        return sum(parameter.numel() for parameter in lora_parameters(transformer).values())
    finally:
        remove_lora(transformer)


@each_full_size
def test_the_full_size_model_has_as_many_parameters_as_the_file_says(file: Path) -> None:
    trained = full_lora(file) if has_gradients(file) else full_layout(file).num_parameters
    assert trained == NUM_PARAMETERS[label(file)]
    head = " ".join(line.removeprefix("# ") for line in file.read_text(encoding="utf-8").splitlines() if line[0] == "#")
    assert f"{trained:,} parameters" in head
    images = parsed(file)["trainer"]["max_steps"] * images_per_step(file, trained)
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
        images = parsed(path)["trainer"]["max_steps"] * images_per_step(path, parameters)
        cells = [cell.strip() for cell in row.split("|")]
        assert (cells[2].split(", of")[0], cells[3]) == (f"{parameters:,}", f"{images:,}"), name
        if has_gradients(path):
            assert cells[4] == str(forwards_per_picture(path)), name
            head = path.read_text(encoding="utf-8")
            assert f" {cells[4]} forwards a picture" in head.replace("\n# ", " "), name


RECIPES = {
    # Groups, size, CFG or embedded guidance, training and validation steps, noise, clip, KL, rank; forwards a picture.
    "sd35_medium/flow_grpo.yaml": (48, 24, 4.5, 10, 40, "FlowSDE", 0.7, 1e-4, 0.01, 32, 74),
    "sd35_medium/flow_grpo_fast.yaml": (64, 18, None, 10, 40, "CPS", 0.8, 1e-5, 0.0, 32, 16),
    "flux1_dev/flow_grpo.yaml": (48, 24, 3.5, 6, 28, "FlowSDE", 0.9, 1e-4, 0.0, 64, 16),
    "flux1_dev/flow_grpo_fast.yaml": (48, 24, 3.5, 6, 28, "CPS", 0.8, 1e-5, 0.0, 64, 12),
    "qwen_image/flow_grpo.yaml": (32, 16, 4.0, 10, 50, "FlowSDE", 1.2, 1e-4, 0.0, 64, 28),
    "qwen_image/flow_grpo_fast.yaml": (32, 16, None, 10, 50, "CPS", 0.8, 1e-5, 0.0, 64, 16),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_the_published_ones(name: str) -> None:
    path = ROOT / "configs" / name
    model = parsed(path)["model"]
    given, backbone, calibration = model["strategy"]["init_args"], model["backbone"]["init_args"], model["calibration"]
    guidance = calibration["guidance_scale"] if calibration["members"] == "cfg" else backbone.get("embedded_guidance")
    kernel, loss, lora = given["kernel"], given["loss"], model["lora"]
    assert loss["clip_low"] == loss["clip_high"]
    assert RECIPES[name] == (
        given["num_groups"],
        given["group_size"],
        guidance,
        given["num_steps"],
        model["num_steps"],
        kernel["class_path"].rpartition(".")[2],
        kernel["init_args"]["noise_level"],
        loss["clip_low"],
        loss["kl_weight"],
        lora["rank"],
        forwards_per_picture(path),
    )
    assert (given["optimizer"]["lr"], given["updates"], lora["alpha"]) == (3e-4, 2, 2 * lora["rank"])
    units = given["num_groups"] * given["group_size"] / given["pictures_per_unit"]
    assert units % (8 * given["updates"]) == 0, "8 GPUs have equally many units of each optimiser step"


def test_all_recipes_are_compared() -> None:
    assert {label(file) for file in TRAINED} - set(RECIPES) == {
        "shapes/diffusion_nft.yaml",
        "shapes/flow_grpo_lora.yaml",
        "shapes/flow_grpo_scales.yaml",
        NFT,
    }


NFT = "sd35_medium/diffusion_nft.yaml"


def test_the_recipe_of_diffusion_nft_is_the_published_one() -> None:
    model = parsed(ROOT / "configs" / NFT)["model"]
    given, lora = model["strategy"]["init_args"], model["lora"]
    assert (given["num_groups"], given["group_size"], given["num_steps"], model["num_steps"]) == (48, 24, 10, 40)
    assert (given["loss"]["beta"], given["loss"]["kl_weight"], given["optimizer"]["lr"]) == (1.0, 1e-4, 3e-4)
    assert (lora["rank"], lora["alpha"], given["ema"]["interval"], model["calibration"]["members"]) == (
        32,
        64,
        1,
        "single",
    )
    assert forwards_per_picture(ROOT / "configs" / NFT) == 50


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


def tiny_adapter(family: str, folder: Path) -> Path:
    """A folder with a LoRA for the tiny model."""
    transformer = FAMILIES[family].tiny().transformer
    add_lora(transformer, LoraOptions(rank=2), 0)
    write_adapter(folder / "adapter", transformer)
    return folder / "adapter"


@each_whole
@pytest.mark.usefixtures("no_plots")
def test_it_takes_a_step_on_a_tiny_model_of_its_class(file: Path, models: Callable[[str], Path], prompts: Path) -> None:
    folder = file.parent.name
    flags = ['--model.rewards={"tiny_rewards:redness": 1.0}']
    if file in STACKED:
        flags.append(f"--model.init_from={tiny_adapter(folder, prompts)}")
    assert main(small(file, models(folder), *flags)) == 0
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
    if has_gradients(file):
        assert column(path, "train/images") == [SHRUNK_IMAGES]
        assert column(path, "budget/forwards") == [SHRUNK_IMAGES * forwards_per_picture(file)]
        assert column(path, "train/ratio_mean") or file.stem == "diffusion_nft"
    elif not takes_turns(file):
        assert column(path, "train/images") == [strategy_of(file).num_cells(len(calibration.values))]
    assert (path / "summary.json").is_file(), "the test at the end"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (False, ["'prompts/train.txt' does not exist", "docs/configs.md"]),
        (True, ["no reward 'remot'", "Did you mean 'remote'?"]),
    ],
)
def test_absent_prompts_and_rewards_come_with_a_hint_before_a_model_is_fetched(
    given: bool, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if given:
        write_prompts(tmp_path)
    misspelt = {"hpsv3": {"reward": "remot", "options": {"urls": ["http://127.0.0.1:8100"]}}}
    files = [f"--config={path}" for path in stacked(OVERLAYS[0])]
    assert main(["fit", *files, f"--model.rewards={json.dumps(misspelt)}"]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for word in words:
        assert word in error
    assert (ROOT / "docs" / "configs.md").is_file()
