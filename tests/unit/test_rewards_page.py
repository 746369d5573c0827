"""What docs/rewards.md says to do for HPSv3 works, with a stand-in for its package."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from config_files import FAMILIES, OVERLAYS, ROOT, UNDERNEATH, lively, parsed, small, write_prompts

from calibri_lightning.__main__ import main
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardConfig, RewardSet

FAKE_HPSV3 = """
import torch
from PIL import Image
print("a line that a library prints")
class HPSv3RewardInferencer:
    def __init__(self, device):
        assert device == "cpu"
    def reward(self, prompts, image_paths):
        assert 0 < len(prompts) == len(image_paths) <= 4
        reds = [Image.open(path).convert("RGB").resize((1, 1), Image.BOX).getpixel((0, 0))[0] for path in image_paths]
        return torch.tensor([[red + len(prompt), 9.0] for red, prompt in zip(reds, prompts)])
"""


@pytest.mark.usefixtures("no_plots")
def test_hpsv3_in_an_environment_of_its_own_as_the_page_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, reward = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    (tmp_path / "hpsv3_worker.py").write_text(worker)
    (tmp_path / "my_rewards.py").write_text(reward)
    (tmp_path / "hpsv3.py").write_text(FAKE_HPSV3)
    monkeypatch.syspath_prepend(str(tmp_path))
    [file] = OVERLAYS
    options = parsed(file)["model"]["rewards"]["my_rewards:HPSv3"]["options"] | {
        "python": sys.executable,
        "device": "cpu",
    }
    assert set(options) == {"python", "worker", "device"}
    rewards = {"my_rewards:HPSv3": {"weight": 1.0, "options": options}, "jpeg_compressibility": 0.0}
    lively(FAMILIES[UNDERNEATH.parent.name].tiny()).save_pretrained(tmp_path / "model")
    assert main(small(file, tmp_path / "model", f"--model.rewards={json.dumps(rewards)}")) == 0
    images = torch.arange(6)[:, None, None, None].expand(6, 3, 8, 8) / 255
    texts = [Prompt("x" * (i % 3), i) for i in range(6)]
    scores = RewardSet({"my_rewards:HPSv3": RewardConfig(1.0, options)}).score(images, texts).total
    assert scores.tolist() == [0.0, 2.0, 4.0, 3.0, 5.0, 7.0]
    sys.modules.pop("my_rewards")
