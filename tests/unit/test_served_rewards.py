"""Rewards of the package through a server: the same numbers as in the process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import requests
import torch
from reward_servers import item, noise, process, ready, served
from shapes_pictures import draw, noisy

from calibri_lightning.__main__ import main
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt, read_prompts
from calibri_lightning.rewards.base import FunctionReward, measure_checked
from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.pixels import to_pixels
from calibri_lightning.rewards.serve_command import make_scorers
from calibri_lightning.rewards.served import RewardScorer, to_images
from calibri_lightning.serving.protocol import PromptText


def test_all_256_bytes_survive_the_way_to_floats_and_back() -> None:
    every = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)
    images = to_images([every, every[::-1].copy()])
    assert images.shape == (2, 3, 16, 16)
    assert images.is_contiguous()
    np.testing.assert_array_equal(to_pixels(images)[0], every)
    np.testing.assert_array_equal(to_pixels(images)[1], every[::-1])
    # The same floats as those of a picture that a backbone has rounded itself.
    assert torch.equal(images[0, 0].flatten(), torch.arange(256) / 255)


def test_floats_keep_their_bits() -> None:
    pixels = np.random.default_rng(0).random((2, 5, 4, 6, 3), dtype=np.float32)
    images = to_images(list(pixels))
    assert images.shape == (2, 5, 3, 4, 6)
    assert images.movedim(-3, -1).numpy().tobytes() == pixels.tobytes()


def pictures(count: int) -> tuple[torch.Tensor, list[Prompt]]:
    """Pictures as the embedded model might draw them, in part scored well, in part badly."""
    from calibri_lightning.shapes.captions import Scene

    prompts = list(read_prompts("shapes:test")[:count])
    drawn = draw([Scene.from_metadata(prompt.metadata) for prompt in prompts], 0)
    return noisy(drawn, 0.1).contiguous(), prompts


def ask(url: str, reward: str, images: torch.Tensor, prompts: list[Prompt], **more: Any) -> dict[str, torch.Tensor]:
    items = []
    for image, prompt in zip(images.permute(0, 2, 3, 1).contiguous().numpy(), prompts, strict=True):
        made = item(image, prompt.text)
        made["prompt"]["metadata"] = dict(prompt.metadata)
        items.append(made)
    answer = requests.post(f"{url}/v1/score", json={"reward": reward, "items": items, **more}, timeout=60)
    assert answer.ok, answer.text
    results = answer.json()["results"]
    return {name: torch.tensor([result["scores"][name] for result in results]) for name in results[0]["scores"]}


def test_shapes_scores_the_same_bits_through_a_server_as_in_the_process() -> None:
    images, prompts = pictures(6)
    here = measure_checked(find_reward("shapes"), images, prompts)
    arguments = ("serve", "--reward", "shapes", "--reward", "jpeg_compressibility", "--device", "cpu", "--port", "0")
    with process(*arguments, module=("-m", "calibri_lightning"), OMP_NUM_THREADS="1") as running:
        url = ready(running)
        there = ask(url, "shapes", images, prompts, exact=True)
        kilobytes = ask(url, "jpeg_compressibility", images, prompts, exact=True)
        running.terminate()
        assert running.wait(30) == 0
    assert there.keys() == here.keys() == {"shapes", "shapes_strict"}
    assert len(set(here["shapes"].tolist())) > 3
    for name in here:
        assert torch.equal(there[name], here[name])
    measured = measure_checked(find_reward("jpeg_compressibility"), images, prompts)
    assert torch.equal(kilobytes["jpeg_compressibility"], measured["jpeg_compressibility"])


def test_bytes_score_as_the_rounded_picture_does() -> None:
    pixels = [noise(seed, 16, 16, 3) for seed in range(3)]
    scorer = RewardScorer(find_reward("jpeg_compressibility"))
    assert scorer.load().pixels == "uint8"
    rounded = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    direct = find_reward("jpeg_compressibility")(rounded, [Prompt("", 0)] * 3)
    assert scorer.score(pixels, [PromptText()] * 3) == {"jpeg_compressibility": direct.tolist()}


def test_a_reward_says_what_it_is_and_which_prompts_it_refuses() -> None:
    scorer = RewardScorer(find_reward("shapes"))
    info = scorer.load()
    assert (info.name, info.extra_names, info.pixels) == ("shapes", ["shapes_strict"], "float32")
    assert info.model == "calibri_lightning.rewards.shapes:ShapesReward"
    prompt = read_prompts("shapes:val")[0]
    assert scorer.check([PromptText(text=prompt.text, metadata=dict(prompt.metadata))]) is None
    assert "cannot score the prompt 'a cat'" in str(scorer.check([PromptText(text="a cat")]))


def test_a_reward_that_raises_or_gives_nan_does_so_through_a_server() -> None:
    def odd(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        if prompts[0].text == "raise":
            raise OSError("no disk")
        return torch.full((len(images),), float("inf"))

    with served(RewardScorer(FunctionReward("odd", odd))) as (url, _):
        body = {"reward": "odd", "items": [item(noise(0))]}
        assert requests.post(url + "/v1/score", json=body, timeout=30).json()["results"][0]["scores"] == {"odd": None}
        body = {"reward": "odd", "items": [item(noise(0), "raise")]}
        answer = requests.post(url + "/v1/score", json=body, timeout=30)
    assert answer.status_code == 500
    assert "raised OSError: no disk" in answer.json()["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["shapes"], "{", []), "it must be JSON"),
        ((["shapes"], '{"shapes": 1}', []), "it must be JSON, an object of options for each reward"),
        ((["shapes"], '{"pickscore": {}}', []), "has 'pickscore', which no --reward names"),
        ((["pickscore"], '{"pickscore": {"dtyp": 1}}', []), "no option 'dtyp'"),
        ((["pickscor"], "{}", []), "Did you mean 'pickscore'"),
        ((["shapes"], "{}", ["cpu", "cpu"]), "--device is given 2 times for 1 rewards"),
        ((["shapes"], "{}", ["tpu"]), "--device is 'tpu'"),
        ((["shapes"], "{}", ["cuda:99"]), "torch sees"),
    ],
)
def test_wrong_command_lines_are_refused(arguments: tuple[list[str], str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scorers(*arguments)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--reward", "--options", "--device", "--token-file", "--max-batch"))
    assert main(["serve"]) == 2
    assert "--reward" in capsys.readouterr().err
    assert main(["serve", "--reward", "shapes", "--host", "0.0.0.0", "--device", "cpu"]) == 2
    assert "there is no token" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    assert main(["serve", "--reward", "shapes"]) == 2
    assert "pip install 'calibri-lightning[serve]'" in capsys.readouterr().err
