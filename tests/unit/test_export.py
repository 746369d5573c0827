"""Exports, loaded with plain diffusers, draw what the hooked model draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from export_tools import Family, Part, write_run
from safetensors import safe_open
from torch import Tensor

from calibri_lightning.adapters import load_adapter, load_transformer
from calibri_lightning.calibration import load_calibration, unload_calibration
from calibri_lightning.tools.export.run import Options, export

FAMILIES = ["sd3", "flux1-dev", "qwen-image", "flux2-klein", "z-image", "lumina2", "krea2"]
SD3 = Family("sd3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SD3.save(tmp_path_factory.mktemp("models") / "base")


def own_copy(base: Path, folder: Path) -> Path:
    """A model that a test may change."""
    return Path(shutil.copytree(base, folder / "base"))


def difference(first: Tensor, second: Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()


def keys_of(folder: Path) -> set[str]:
    (file,) = (folder / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_folder_draws_what_the_hooked_model_draws(tmp_path: Path, name: str) -> None:
    family = Family(name)
    base = family.save(tmp_path / "base")
    run = write_run(tmp_path / "run", base, family.backbone)
    assert export(Options(run, tmp_path / "out")).form == "folder"
    pipe = family.load(base)
    plain = family.draw(pipe)
    hooked = family.draw(load_calibration(pipe, run))
    exported = family.draw(family.load(tmp_path / "out"))
    assert difference(exported, hooked) < 1e-6
    assert difference(plain, hooked) > 1e-4, "the scales have an effect"


def test_config_and_keys_are_those_of_the_base_and_nothing_but_safetensors_holds_weights(
    tmp_path: Path, base: Path
) -> None:
    base = own_copy(base, tmp_path)
    (base / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (base / "vae").chmod(0o555)  # as in a cache
    (base / "LICENSE.md").write_text("terms")
    export(Options(write_run(tmp_path / "run", base, parts=("scales", "adapter")), tmp_path / "out"))
    files = {p.relative_to(base) for p in base.rglob("*") if p.is_file() and p.suffix != ".bin"}
    written = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files <= written
    assert {p.parts[0] for p in written - files} == {"README.md", "calibration"}
    changed = {p for p in files if (base / p).read_bytes() != (tmp_path / "out" / p).read_bytes()}
    assert changed == {Path("transformer/diffusion_pytorch_model.safetensors")}
    assert keys_of(base) == keys_of(tmp_path / "out")
    modes = {p.is_dir(): p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*")}
    assert modes == {True: 0o755, False: 0o644}, "others can load it, and its maker remove it"


@pytest.mark.parametrize(
    "parts",
    [("scales", "adapter"), ("adapter",), ("full",), ("scales", "full"), ("scales", "merged"), ("merged", "adapter")],
    ids="+".join,
)
def test_all_that_a_run_can_hold_is_folded(tmp_path: Path, base: Path, parts: tuple[Part, ...]) -> None:
    run = write_run(tmp_path / "run", base, parts=parts)
    pipe = SD3.load(base)
    plain = SD3.draw(pipe)
    if "full" in parts:
        load_transformer(pipe.transformer, run / "transformer")
    if "merged" in parts:
        load_adapter(pipe.transformer, tmp_path / "run-first", merge=True)
    hooked = SD3.draw(load_calibration(pipe, run))
    export(Options(run, tmp_path / "out"))
    exported = SD3.draw(SD3.load(tmp_path / "out"))
    assert difference(exported, hooked) < 1e-6
    assert difference(plain, hooked) > 1e-4
    if "full" not in parts:  # the folder holds its scales for the other way to load it
        apart = load_calibration(unload_calibration(pipe), tmp_path / "out" / "calibration")
        assert torch.equal(SD3.draw(apart), hooked)


def test_a_learned_weight_of_the_one_member_is_folded_too(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base, weight_mode="raw")
    export(Options(run, tmp_path / "out"))
    hooked = SD3.draw(load_calibration(SD3.load(base), run))
    assert difference(SD3.draw(SD3.load(tmp_path / "out")), hooked) < 1e-6


# Scales that change more than bfloat16 does on a tiny model, so that a missing fold would show.
@pytest.mark.parametrize("name", ["sd3", "qwen-image", "z-image"])
def test_bfloat16_is_as_near_to_exact_pictures_folded_as_hooked(tmp_path: Path, name: str) -> None:
    family, half = Family(name), torch.bfloat16
    base = family.save(tmp_path / "base")
    run = write_run(tmp_path / "run", base, family.backbone, dtype="bfloat16", spread=1.0)
    export(Options(run, tmp_path / "out"))
    pipe = family.load(base, half)
    plain = family.draw(pipe)
    hooked = load_calibration(pipe, run)
    drawn = family.draw(hooked)
    exact = family.draw(hooked.to(torch.float32))
    exported = family.load(tmp_path / "out", half)
    assert {p.dtype for p in exported.transformer.parameters()} == {half}
    noise = difference(drawn, exact)
    assert difference(family.draw(exported), exact) < 1.5 * noise
    assert difference(plain, exact) > 1.5 * noise, "without the fold, this test fails"


@pytest.mark.parametrize("members", ["cfg", 2])
def test_pairs_and_ensembles_become_files_for_load_calibration(tmp_path: Path, base: Path, members) -> None:
    run = write_run(tmp_path / "run", base, parts=("scales", "adapter"), members=members, weight_mode="raw")
    assert export(Options(run, tmp_path / "out")).form == "calibration"
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert written == {"README.md", "calibration.json", *adapter}

    stock = SD3.load(base)

    def draw(folder: Path) -> Tensor:
        pipe = load_calibration(stock, folder)
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
        options["generator"] = torch.Generator().manual_seed(3)
        drawn = pipe("a red circle", guidance_scale=3.0, **options).images
        unload_calibration(stock)
        return drawn

    assert torch.equal(draw(tmp_path / "out"), draw(run))


def test_parts_of_other_folders_come_along_and_no_path_of_this_machine_does(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base, parts=("scales", "merged", "adapter"), members="cfg", weight_mode="raw")
    export(Options(run, tmp_path / "out"))
    for path in (p for p in (tmp_path / "out").rglob("*") if p.suffix in (".json", ".md")):
        text = path.read_text()
        assert str(tmp_path) not in text, path
        assert "/home/somebody" not in text, path
        assert "secret" not in text, path
    for folder in (run, tmp_path / "run-first"):
        folder.rename(folder.with_name("gone-" + folder.name))
    pipe = SD3.load(base)
    load_adapter(pipe.transformer, tmp_path / "out" / "merged_adapter", merge=True)
    load_calibration(pipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["model"]["name"] == "base"


def test_configurations_of_a_model_say_no_path_of_this_machine_and_else_the_same(tmp_path: Path, base: Path) -> None:
    base = own_copy(base, tmp_path)
    given: dict[str, dict[str, object]] = {}
    for name, path in (
        ("vae", "/home/somebody/models/base"),
        ("text_encoder", "owner/name"),
        ("transformer", "../base"),
    ):
        file = base / name / "config.json"
        given[name] = json.loads(file.read_text()) | {"_name_or_path": path}
        file.write_text(json.dumps(given[name]))
    export(Options(write_run(tmp_path / "run", base), tmp_path / "out"))
    found = {name: json.loads((tmp_path / "out" / name / "config.json").read_text()) for name in given}
    assert found["vae"] == given["vae"] | {"_name_or_path": "base"}
    assert found["transformer"] == given["transformer"] | {"_name_or_path": "base"}
    assert (base / "text_encoder/config.json").read_bytes() == (tmp_path / "out/text_encoder/config.json").read_bytes()
    SD3.load(tmp_path / "out")


def test_a_base_model_that_moved_is_found_with_base(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", own_copy(base, tmp_path))
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    export(Options(run, tmp_path / "out", base=str(moved)))
    hooked = SD3.draw(load_calibration(SD3.load(moved), run))
    assert difference(SD3.draw(SD3.load(tmp_path / "out")), hooked) < 1e-6
