"""The probe of a small picture finds what the probe of a whole one finds, at a small part of the cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch

from calibri_lightning.assembly import PROBE_ROWS
from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Backbone, Krea2, Lumina2, QwenImage, Stock, ZImage
from calibri_lightning.backbones.native import Native
from calibri_lightning.calibration import attach, find_sites, probe
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

NATIVE: dict[str, Callable[[], Native]] = {
    "sd3": lambda: SD3.of(build_pipeline(TINY)),
    "flux1": lambda: FLUX1.of(tiny.fresh(tiny.flux1), 16, 24),
    "flux2": lambda: FLUX2.of(tiny.fresh(tiny.flux2_dev), 16, 24),
    "klein": lambda: FLUX2.of(tiny.fresh(tiny.flux2_klein), 16, 24),
    "qwen": lambda: QwenImage.of(tiny.fresh(tiny.qwen_image), 16, 24),
    "z_image": lambda: ZImage.of(tiny.fresh(tiny.z_image), 16, 24),
    "lumina2": lambda: Lumina2.of(tiny.fresh(tiny.lumina2), 32, 48),
    "krea2": lambda: Krea2.of(tiny.fresh(tiny.krea2), 16, 24),
}


@pytest.mark.parametrize("family", NATIVE)
def test_the_example_is_shaped_as_an_encoded_text(family: str) -> None:
    backbone = NATIVE[family]()
    encoded = backbone.encode(["a red circle"])
    example = backbone.example(encoded.lengths[0] if encoded.lengths else None)
    assert example.lengths == encoded.lengths
    assert {n: (t.shape, t.dtype) for n, t in example.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in encoded.tensors.items()
    }
    assert (
        backbone.text_shapes(encoded.lengths[0] if encoded.lengths else None)["prompt"][0]
        == encoded.tensors["prompt"].shape[1]
    )


@pytest.mark.parametrize("family", NATIVE)
def test_a_small_picture_shows_the_same_dead_sites(family: str) -> None:
    backbone = NATIVE[family]()
    attachment = attach(backbone.transformer, find_sites(backbone.transformer))
    small = probe(attachment, lambda: backbone.probe_forward(PROBE_ROWS))
    whole = probe(attachment, lambda: Backbone.probe_forward(backbone, 4))
    assert small == whole
    assert bool(small) == (family == "qwen"), "the text of Qwen's last block"


def test_a_site_that_its_weights_silence_is_found() -> None:
    """Connections alone would not tell: the gate is there, and zero."""
    backbone = SD3.of(build_pipeline(TINY))
    linear = backbone.transformer.transformer_blocks[1].norm1.linear
    width = linear.out_features // 6
    with torch.no_grad():
        linear.weight[2 * width : 3 * width] = 0
        linear.bias[2 * width : 3 * width] = 0
    attachment = attach(backbone.transformer, find_sites(backbone.transformer))
    dead = probe(attachment, lambda: backbone.probe_forward(PROBE_ROWS))
    assert [site.name for site in dead] == ["transformer_blocks.1.attn.image"]


@pytest.mark.parametrize("family", NATIVE)
def test_the_probe_is_cheap_and_encodes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = NATIVE[family]()
    monkeypatch.setattr(backbone, "encode_text", lambda text: pytest.fail("a text was encoded"))
    size, shape = backbone.image_size, backbone.latent_shape()
    output = backbone.probe_forward(2)
    assert output.shape[0] == 2
    assert output[0].numel() <= 4 / backbone.num_image_tokens * torch.Size(shape).numel()
    assert (backbone.image_size, backbone.latent_shape()) == (size, shape), "the backbone itself stays as it is"


@pytest.mark.parametrize("build", [tiny.flux1, tiny.qwen_image, tiny.wan, tiny.ltx])
def test_stock_probes_a_small_picture_and_runs_no_forward_to_get_there(build: Callable[..., Any]) -> None:
    frames = {"num_frames": 5} if build in (tiny.wan, tiny.ltx) else {}
    backbone = Stock.of(tiny.fresh(build), 128, 128, **frames)
    attachment = attach(backbone.transformer, find_sites(backbone.transformer))
    calls: list[int] = []
    backbone.transformer.register_forward_hook(lambda *_: calls.append(1))
    forward = backbone._first_forward(backbone._call)
    assert not calls
    small = probe(attachment, lambda: backbone.probe_forward(2))
    assert backbone._captured is not None
    sizes = [sum(t.numel() for t in _tensors(part)) for part in (backbone._captured, forward)]
    assert sizes[0] < sizes[1]
    backbone._captured = forward
    assert small == probe(attachment, lambda: backbone.probe_forward(2))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []
