"""A model that cannot be loaded says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import nn

from calibri_lightning.backbones.alignment import BYTES, align
from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.errors import UserError
from calibri_lightning.shapes.pipeline import TINY, build_pipeline


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_folder / "model", tmp_path / "copy"))


@pytest.mark.parametrize("component", ["vae", "text_encoder_2", "tokenizer", "scheduler", "transformer"])
def test_a_missing_component_is_named(broken: Path, component: str) -> None:
    shutil.rmtree(broken / component)
    with pytest.raises(UserError, match=f"lacks its component '{component}'"):
        SD3(str(broken))


def test_missing_weights_are_named(broken: Path) -> None:
    for file in (broken / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="component 'vae'.*has no weights"):
        SD3(str(broken))


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
def test_corrupted_weights_are_named(broken: Path, damage: str) -> None:
    file = next((broken / "transformer").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes({"truncate": content[:-100], "garbage": b"\xff" * 2000, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"component 'transformer' are damaged: .*safetensors"):
        SD3(str(broken))


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_weights_that_lack_a_tensor_are_refused(broken: Path, component: str) -> None:
    """Libraries initialise absent tensors at random; that model would not be the user's."""
    from safetensors.torch import load_file, save_file

    file = next((broken / component).glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=component):
        SD3(str(broken))


def test_unusable_model_indices_are_refused(broken: Path) -> None:
    index = broken / "model_index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({**entries, "_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="FluxPipeline.*StableDiffusion3Pipeline"):
        SD3(str(broken))
    index.write_text("{")
    with pytest.raises(UserError, match="not a diffusers model index"):
        SD3(str(broken))
    index.unlink()
    with pytest.raises(UserError, match=r"no model_index\.json"):
        SD3(str(broken))


def test_unusable_names_are_refused(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="neither an existing folder nor a Hub id"):
        SD3(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="'float32' or 'bfloat16'"):
        SD3(str(tiny_folder / "model"), dtype="float16")
    monkeypatch.setattr("calibri_lightning.backbones.loading.SHAPES_FOLDER", tmp_path / "absent")
    with pytest.raises(UserError, match=r"shapes\.train"):
        SD3()


def test_an_unreachable_hub_model_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("We couldn't connect\nsecond line")

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", offline)
    with pytest.raises(UserError, match="could not be fetched from the Hub .*couldn't connect") as caught:
        SD3("owner/name")
    assert "\n" not in str(caught.value)


def test_weights_from_a_file_lie_where_those_made_here_do(tmp_path: Path) -> None:
    """Else matrix kernels of some CPUs give other last bits."""
    made = build_pipeline(TINY)
    made.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    begins = BYTES
    for padding in range(0, BYTES, 8):
        if begins % BYTES == 0:
            save_file(weights, path, {"format": "pt", "askew": "x" * padding})
            begins = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert begins % BYTES
    loaded = SD3(str(tmp_path / "model")).transformer
    for ours, theirs in zip(made.transformer.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.data_ptr() % BYTES == 0
    view = nn.Linear(4, 4)
    view.weight.data = torch.arange(17.0)[1:].view(4, 4)
    align(view)
    assert view.weight.data_ptr() % BYTES == 0
    assert view.weight.flatten().tolist() == list(range(1, 17))
