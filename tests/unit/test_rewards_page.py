"""What docs/rewards.md says to do for HPSv3 works, with a stand-in for its package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from config_files import FAMILIES, OVERLAYS, ROOT, UNDERNEATH, lively, parsed, small, write_prompts
from script_stubs import served

from calibri_lightning.__main__ import main
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardConfig, RewardSet


@pytest.mark.usefixtures("no_plots")
def test_hpsv3_in_an_environment_of_its_own_as_the_overlay_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    [file] = [file for file in OVERLAYS if file.stem == "hpsv3"]
    given = parsed(file)["model"]["rewards"]["hpsv3"]
    assert (given["reward"], given["weight"], set(given["options"])) == ("remote", 1.0, {"urls", "extra_names"})
    lively(FAMILIES[UNDERNEATH.parent.name].tiny()).save_pretrained(tmp_path / "model")
    with served("hpsv3", tmp_path / "stubs", "--weights", "HPSv3.safetensors") as url:
        options = given["options"] | {"urls": [url]}
        rewards = {"hpsv3": {"reward": "remote", "options": options}, "jpeg_compressibility": 0.0}
        assert main(small(file, tmp_path / "model", f"--model.rewards={json.dumps(rewards)}")) == 0
        images = torch.arange(6)[:, None, None, None].expand(6, 3, 8, 8) / 255
        texts = [Prompt("x" * (i % 3), i) for i in range(6)]
        reward = RewardSet({"hpsv3": RewardConfig(1.0, options, "remote")})
        reward.check(texts)
        scores = reward.score(images, texts)
    assert scores.total.tolist() == [0.0, 2.0, 4.0, 3.0, 5.0, 7.0]
    assert scores.each["hpsv3_sigma"].tolist() == [9.0] * 6


def test_the_page_names_the_script_and_the_overlay() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    for name in ("calibri_lightning/serving/scripts/hpsv3.py", "configs/rewards/hpsv3.yaml"):
        assert name in page
        assert (ROOT / name).is_file()
