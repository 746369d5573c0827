"""The probe finds exactly the sites without effect."""

from __future__ import annotations

import sys

import pytest
import torch
from calibration_models import MODELS, hooked, inputs, run, tiny_sd3

from calibri_lightning.calibration import probe
from calibri_lightning.errors import UserError


@MODELS
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_probe_finds_no_dead_site_in_a_sound_model(build, batch: int) -> None:
    model = build()
    arguments = inputs(model, batch)
    assert probe(hooked(model), lambda: run(model, arguments)) == ()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_probe_finds_exactly_the_dead_sites(batch: int) -> None:
    model = tiny_sd3()
    for name in ("ff_context.net.2", "attn2.to_out.0"):
        projection = model.get_submodule(f"transformer_blocks.0.{name}")
        projection.weight.zero_()
        projection.bias.zero_()
    attachment = hooked(model)
    arguments = inputs(model, batch)
    dead = probe(attachment, lambda: run(model, arguments))
    assert [site.name for site in dead] == [
        "transformer_blocks.0.attn2.image",
        "transformer_blocks.0.mlp.text",
    ]
    # A branch that nothing reads (the text side of Qwen-Image's last block) is dead too: here, every branch.
    attachment.detach()
    attachment = hooked(model)
    assert set(probe(attachment, lambda: run(model, arguments)[:, :, :0])) == set(attachment.sites)


def test_the_probe_finds_a_small_site_that_rounding_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_sd3()
    small = model.transformer_blocks[0].ff_context.net[2]
    small.weight.mul_(1e-3)
    small.bias.mul_(1e-3)
    arguments = inputs(model, 2)

    def coarse() -> torch.Tensor:
        return run(model, arguments).mul(500).round()

    attachment = hooked(model)
    assert probe(attachment, coarse) == ()
    monkeypatch.setattr(sys.modules["calibri_lightning.calibration.attach"], "PROBE_FACTORS", (3.0,))
    assert [site.name for site in probe(attachment, coarse)] == ["transformer_blocks.0.mlp.text"]


def test_the_probe_refuses_a_model_that_returns_nan() -> None:
    model = tiny_sd3()
    attachment = hooked(model)
    with pytest.raises(UserError, match="NaN or infinity"):
        probe(attachment, lambda: torch.full((2, 3), float("nan")))
