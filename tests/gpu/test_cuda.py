"""What only a GPU can show: the same pictures and rewards as on the CPU, and no stray synchronisation."""

from __future__ import annotations

import pytest
import torch

from calibri_lightning.backbones import SD3
from calibri_lightning.calibration import attach, build_layout, find_sites
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.shapes.captions import prompts
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _evaluator(device: str) -> Evaluator:
    backbone = SD3.of(build_pipeline(TINY))
    backbone.to(device)
    sites = find_sites(backbone.transformer)
    layout = build_layout(sites, "gate", "cfg", 3.0, "guidance")
    return Evaluator(backbone, attach(backbone.transformer, sites), layout, RewardSet({"shapes": 1.0}), 16)


def test_rewards_and_pictures_agree_with_the_cpu() -> None:
    chosen, seeds = prompts("val")[:6], list(range(6))
    images = {}
    for device in ("cpu", "cuda"):
        evaluator = _evaluator(device)
        theta = evaluator.layout.start[None]
        images[device] = torch.cat([i.cpu() for _, i in evaluator.images(theta, chosen, seeds, 3)])
    # TF32 is off by default for matrix products, so only the order of sums differs.
    torch.testing.assert_close(images["cuda"], images["cpu"], atol=2e-3, rtol=0)


def test_scales_of_one_are_the_identity_bit_for_bit() -> None:
    evaluator = _evaluator("cuda")
    backbone, attachment = evaluator.backbone, evaluator.attachment
    noise, sigma = backbone.noise(range(4)), torch.full((4,), 0.5, device="cuda")
    conditioning = backbone.encode(["a red circle"] * 4)
    with torch.no_grad():
        attachment.set_rows(None)
        plain = backbone.velocity(noise, sigma, conditioning)
        with attachment.rows(torch.ones(4, len(attachment.sites))):
            assert torch.equal(backbone.velocity(noise, sigma, conditioning), plain)
