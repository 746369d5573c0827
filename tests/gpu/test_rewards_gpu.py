"""Rewards on a GPU score as on the CPU, and pictures that may stay there do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_clip import save_clip

from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.served import RewardScorer
from calibri_lightning.serving.protocol import PromptText

pytestmark = pytest.mark.gpu

IMAGES = torch.rand(5, 3, 40, 56, generator=torch.Generator().manual_seed(0))
PROMPTS = tuple(Prompt(text, index) for index, text in enumerate(("cat", "red dog", "", "cat", "blue")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("resize", ["pillow", "torch"])
@pytest.mark.parametrize("name", ["pickscore", "clipscore", "clip_iqa"])
def test_scores_are_those_of_the_cpu(folder: Path, name: str, resize: str) -> None:
    options = {"pretrained": str(folder), "resize": resize}
    expected = find_reward(name, options)(IMAGES, PROMPTS)
    found = find_reward(name, options)(IMAGES.cuda(), PROMPTS)
    assert found.device.type == "cuda"
    # With torch, products of a GPU differ in the last bits, and with them a pixel's rounding here and there.
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3 if resize == "pillow" else 0.05)


def test_pictures_stay_on_the_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibri_lightning.rewards.clip_model.to_pixels", None)
    reward = find_reward("clipscore", {"pretrained": str(folder), "resize": "torch"})
    reward.check(PROMPTS)
    reward.prepare(torch.device("cuda"))
    images = IMAGES.cuda()
    assert reward(images, PROMPTS).device.type == "cuda"


def test_a_server_scores_on_its_gpu(folder: Path) -> None:
    reward = find_reward("clipscore", {"pretrained": str(folder)})
    scorer = RewardScorer(reward, "cuda:0")
    scorer.load()
    pictures = [(picture * 255).round().byte().permute(1, 2, 0).numpy() for picture in IMAGES]
    scores = scorer.score(pictures, [PromptText(text=prompt.text) for prompt in PROMPTS])["clipscore"]
    expected = find_reward("clipscore", {"pretrained": str(folder)})(IMAGES, PROMPTS)
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-3)
