"""Calibrations on adapters: loaded together, missed where they are missing, and told apart in init_from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_tools import disturb
from calibration_models import tiny_sd3
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from calibri_lightning.adapters import (
    AdapterRecord,
    LoraOptions,
    add_lora,
    load_adapter,
    remove_lora,
    write_adapter,
    write_transformer,
)
from calibri_lightning.adapters.lora import lora_layers
from calibri_lightning.calibration import (
    CalibrationFile,
    build_layout,
    find_sites,
    fingerprint,
    fuse,
    load_calibration,
    read_calibration,
    unload_calibration,
    write_calibration,
)
from calibri_lightning.calibration.document import from_json, to_json
from calibri_lightning.errors import UserError
from calibri_lightning.shapes.pipeline import TINY, build_pipeline
from calibri_lightning.stacking import Start, parse_start


def draw(pipe: StableDiffusion3Pipeline) -> Tensor:
    size = TINY.image_size // 4
    shape = (1, pipe.transformer.config.in_channels, size, size)
    arguments = {"height": TINY.image_size, "width": TINY.image_size, "output_type": "latent"}
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return pipe("a red circle", guidance_scale=1.0, num_inference_steps=2, latents=noise, **arguments).images


def run_folder(folder: Path, targets: list[str] | None = None, entry: bool = True, merged: bool = False) -> Path:
    """What a run that trained scales on a LoRA leaves."""
    pipe = build_pipeline(TINY)
    layout = build_layout(find_sites(pipe.transformer), "gate", "single", 1.0, "fixed")
    add_lora(pipe.transformer, LoraOptions(rank=2, targets=targets), seed=0)
    disturb(pipe.transformer)
    digest = write_adapter(folder / "adapter", pipe.transformer)
    record = AdapterRecord("somewhere/else", digest, merged) if entry else None
    values = tuple(torch.linspace(0.5, 1.5, layout.num_parameters).tolist())
    file = CalibrationFile(
        layout.names, values, "gate", layout.members, "fixed", fingerprint(pipe.transformer), adapter=record
    )
    write_calibration(folder / "calibration.json", file)
    return folder


def stacked(folder: Path) -> Tensor:
    """Pictures by both, put on one after the other."""
    pipe = build_pipeline(TINY)
    load_adapter(pipe.transformer, folder)
    load_calibration(pipe, folder / "calibration.json", check_adapter=False)
    return draw(pipe)


@pytest.mark.parametrize("entry", [True, False])
def test_the_folder_of_a_run_brings_both_and_takes_both_away(tmp_path: Path, entry: bool) -> None:
    run_folder(tmp_path, entry=entry)
    pipe = build_pipeline(TINY)
    plain, keys = draw(pipe), list(pipe.transformer.state_dict())
    assert torch.equal(draw(load_calibration(pipe, tmp_path)), stacked(tmp_path))
    assert not torch.allclose(draw(pipe), plain, atol=1e-2)
    unload_calibration(pipe)
    assert torch.equal(draw(pipe), plain)
    assert list(pipe.transformer.state_dict()) == keys
    # An adapter that was there before stays.
    load_adapter(pipe.transformer, tmp_path)
    with_lora = draw(pipe)
    assert torch.equal(draw(load_calibration(pipe, tmp_path)), stacked(tmp_path))
    unload_calibration(pipe)
    assert torch.equal(draw(pipe), with_lora)
    assert not torch.equal(with_lora, plain)


def test_scales_without_their_adapter_are_refused(tmp_path: Path) -> None:
    file = run_folder(tmp_path) / "calibration.json"
    pipe = build_pipeline(TINY)
    with pytest.raises(UserError, match="found on the adapter somewhere/else .*given has none.*run's folder.*load_ada"):
        load_calibration(pipe, file)
    assert not hasattr(pipe, "_calibri_loaded")
    add_lora(pipe.transformer, LoraOptions(rank=2), seed=5)
    with pytest.raises(UserError, match="given has another one"):
        load_calibration(pipe, file)
    with pytest.raises(UserError, match="holds an adapter, and the pipeline has another one"):
        load_calibration(pipe, tmp_path)
    remove_lora(pipe.transformer)
    load_adapter(pipe.transformer, tmp_path)
    assert torch.equal(draw(load_calibration(pipe, file)), stacked(tmp_path))


def test_a_merged_adapter_cannot_be_seen_so_the_user_says_it(tmp_path: Path) -> None:
    file = run_folder(tmp_path, merged=True) / "calibration.json"
    assert read_calibration(file).adapter.merged
    pipe = build_pipeline(TINY)
    load_adapter(pipe.transformer, tmp_path, merge=True)
    with pytest.raises(UserError, match="check_adapter=False"):
        load_calibration(pipe, file)
    assert torch.allclose(draw(load_calibration(pipe, file, check_adapter=False)), stacked(tmp_path), atol=2e-5)


def test_a_folder_that_cannot_be_loaded_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    run_folder(tmp_path)
    path = tmp_path / "calibration.json"
    write_calibration(path, replace(read_calibration(path), adapter=AdapterRecord("x", "0" * 64)))
    pipe = build_pipeline(TINY)
    plain = draw(pipe)
    with pytest.raises(UserError, match="given has another one"):
        load_calibration(pipe, tmp_path)
    assert not lora_layers(pipe.transformer)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("targets", [None, ["*"]])
def test_both_are_fused_into_the_weights(tmp_path: Path, targets: list[str] | None) -> None:
    run_folder(tmp_path, targets)
    expected, pipe = stacked(tmp_path), build_pipeline(TINY)
    keys = list(pipe.transformer.state_dict())
    fuse(load_calibration(pipe, tmp_path))
    assert list(pipe.transformer.state_dict()) == keys
    assert torch.allclose(draw(pipe), expected, atol=1e-4)


def test_files_without_an_adapter_read_and_write_as_ever(tmp_path: Path) -> None:
    file = read_calibration(run_folder(tmp_path, entry=False) / "calibration.json")
    assert "adapter" not in json.loads(to_json(file))
    assert from_json(to_json(file)) == file
    recorded = replace(file, adapter=AdapterRecord("owner/name", "ab" * 32, True))
    assert from_json(to_json(recorded)) == recorded
    assert json.loads(to_json(recorded))["format_version"] == 1
    for wrong in (None, [], {"source": "a"}, {"source": "a", "sha256": "b", "merged": 1}):
        document = json.loads(to_json(recorded)) | {"adapter": wrong}
        with pytest.raises(UserError, match="adapter"):
            from_json(json.dumps(document))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what earlier runs left."""
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "runs" / "both")
    model = tiny_sd3(num_layers=1)
    write_transformer(tmp_path / "runs" / "full" / "transformer", model)
    add_lora(model, LoraOptions(rank=1), seed=0)
    write_adapter(tmp_path / "lora", model)
    (tmp_path / "runs" / "both" / "checkpoints").mkdir()
    (tmp_path / "runs" / "both" / "checkpoints" / "last.ckpt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("init_from", "start"),
    [
        (None, Start()),
        ([], Start()),
        ("runs/both", Start(Path("runs/both/calibration.json"), "runs/both/adapter")),
        ("runs/both/calibration.json", Start(Path("runs/both/calibration.json"))),
        ("runs/both/adapter", Start(adapter="runs/both/adapter")),
        ("lora", Start(adapter="lora")),
        ("owner/name", Start(adapter="owner/name")),
        ("runs/full", Start(transformer=Path("runs/full/transformer"))),
        ("runs/full/transformer", Start(transformer=Path("runs/full/transformer"))),
        (["runs/full", "runs/both/calibration.json", "owner/name"],
         Start(Path("runs/both/calibration.json"), "owner/name", Path("runs/full/transformer"))),
    ],
)  # fmt: skip
def test_each_part_of_init_from_is_told_by_what_it_is(here: Path, init_from, start: Start) -> None:
    assert parse_start(init_from) == start


@pytest.mark.parametrize(
    ("init_from", "message"),
    [
        (["runs/both", "lora"], r"two of one kind \(adapter\): runs/both and lora"),
        (["lora", "owner/name"], r"two of one kind \(adapter\): lora and owner/name"),
        (["runs/both", "runs/both/calibration.json"], r"two of one kind \(calibration\)"),
        ("runs", "runs holds none of what .* Its folders both, full do"),
        ("runs/both/checkpoints", "checkpoints holds none of what"),
        ("runs/both/checkpoints/last.ckpt", "--ckpt_path"),
        ("lora/adapter_model.safetensors", "one file of several. Give its folder: lora "),
        ("lora/adapter_config.json", "one file of several"),
        ("pipeline", "whole pipeline.*pretrained"),
        ("bare", r"bare lacks adapter_config\.json"),
        ("notes.txt", r"no calibration\.json"),
        ("runs/other.json", "neither a file nor a folder here"),
        ("/nowhere", "neither a file nor a folder here"),
        ("a/b/c", "neither a file nor a folder here"),
    ],
)
def test_what_is_unclear_is_refused_with_a_hint(here: Path, init_from, message: str) -> None:
    for folder in ("pipeline", "bare"):
        (here / folder).mkdir()
    (here / "pipeline" / "model_index.json").write_text("{}")
    (here / "bare" / "adapter_model.safetensors").touch()
    (here / "notes.txt").touch()
    with pytest.raises(UserError, match=message):
        parse_start(init_from)
