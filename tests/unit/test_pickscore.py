"""PickScore on a tiny CLIP model, loaded through the path that loads the published one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny_clip import TOKENS, by_hand, save_clip
from tiny_runs import TinyRuns
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardConfig, RewardSet
from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.pickscore import PickScore

TEXTS = ("cat", "red dog", "a", "cat", "two dogs", "cat", "blue")
PROMPTS = tuple(Prompt(text, index) for index, text in enumerate(TEXTS))
IMAGES = torch.rand(len(TEXTS), 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def expected(folder: Path, image: Tensor, text: str) -> float:
    """100 cos, or what the model's temperature makes of it."""
    return by_hand(folder, image, text).scale * by_hand(folder, image, text).cosine


def test_scores_are_those_of_an_independent_computation(folder: Path) -> None:
    scores = PickScore(str(folder), batch_size=3)(IMAGES, PROMPTS)
    by_hand = torch.tensor([expected(folder, image, text) for image, text in zip(IMAGES, TEXTS, strict=True)])
    assert by_hand.std() > 0.1, "the tiny model tells pictures or prompts apart"
    torch.testing.assert_close(scores, by_hand, atol=2e-4, rtol=0)


def test_a_score_does_not_depend_on_the_batch_around_it(folder: Path) -> None:
    reward = PickScore(str(folder))
    together = reward(IMAGES, PROMPTS)
    alone = torch.cat([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(PROMPTS))])
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    shuffled = reward(IMAGES[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(alone, together, atol=2e-5, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=2e-5, rtol=0)
    torch.testing.assert_close(PickScore(str(folder), batch_size=2)(IMAGES, PROMPTS), together, atol=2e-5, rtol=0)


def test_a_prompt_is_cut_where_the_model_stops_reading_and_that_is_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = PickScore(str(folder))
    fits, long, longer = "a" * (TOKENS - 2), "a" * (TOKENS - 1), "a" * 30
    prompts = [Prompt(text, index) for index, text in enumerate((fits, long, "a", longer))]
    with caplog.at_level(logging.WARNING):
        reward.check(prompts)
        reward.check(prompts)
        scores = reward(IMAGES[:1].expand(4, -1, -1, -1), prompts)
    [record] = caplog.records
    assert f"first {TOKENS} tokens of a prompt: 2 of 4 go on after that, for instance {long!r}" in record.getMessage()
    assert scores[1] == pytest.approx(float(scores[3]), abs=2e-5)
    assert scores[1] == pytest.approx(expected(folder, IMAGES[0], long), abs=2e-4)
    assert abs(scores[1] - scores[2]) > 1e-3


def test_bfloat16_and_inference_mode(folder: Path) -> None:
    reward = PickScore(str(folder), dtype="bfloat16", device="cpu")
    scores = reward(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.is_inference()
    torch.testing.assert_close(scores, PickScore(str(folder))(IMAGES, PROMPTS), atol=0.6, rtol=0)
    # The set's sum is an ordinary tensor again.
    assert not RewardSet.of((reward, 1.0)).score(IMAGES, PROMPTS).total.is_inference()


def test_prepared_rewards_have_their_model_on_the_device_of_the_pictures(folder: Path) -> None:
    rewards = RewardSet({"pickscore": RewardConfig(1.0, {"pretrained": str(folder)})})
    elsewhere = RewardSet({"pickscore": RewardConfig(1.0, {"pretrained": str(folder), "device": "cpu"})})
    for made in (rewards, elsewhere):
        made.prepare(torch.device("meta"))
    devices = [next(made.entries[0].reward._scorer.model.parameters()).device.type for made in (rewards, elsewhere)]
    assert devices == ["meta", "cpu"]


def test_nothing_is_loaded_before_prompts_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPModel

    loaded = []
    original = CLIPModel.from_pretrained
    monkeypatch.setattr(
        CLIPModel, "from_pretrained", lambda *args, **more: loaded.append(args) or original(*args, **more)
    )
    reward = PickScore(str(folder))
    assert not loaded
    reward.check(PROMPTS)
    reward(IMAGES, PROMPTS)
    assert len(loaded) == 1


def test_the_processor_is_the_authors_for_the_published_weights_and_the_folders_own_else(folder: Path) -> None:
    assert (PickScore()._pretrained, PickScore()._processor) == (PickScore.published, PickScore.published_processor)
    assert PickScore(str(folder))._processor == str(folder)
    assert PickScore(str(folder), processor="some/other")._processor == "some/other"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "/no/such/folder"}, "weights .* '/no/such/folder' is neither an existing folder nor a Hub id"),
        ({}, f"weights .* could not be loaded from '{PickScore.published}' .*options: {{pretrained: FOLDER}}"),
    ],
)
def test_a_missing_model_is_found_before_any_work(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardSet({"pickscore": RewardConfig(1.0, options)}).check(PROMPTS)


def test_incomplete_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="weights .* could not be loaded"):
        PickScore(str(tmp_path / "empty")).check(PROMPTS)
    with pytest.raises(UserError, match="tokenizer .* could not be loaded"):
        PickScore(str(folder), processor=str(tmp_path / "empty")).check(PROMPTS)
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match="no CLIP model, or an incomplete one: .*vision_model.encoder.layers.2"):
        PickScore(str(other)).check(PROMPTS)


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights .* could not be loaded"):
        PickScore(str(tmp_path)).check(PROMPTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtpye": "bfloat16"}, r"no option 'dtpye'; it has pretrained, .* Did you mean 'dtype'\?"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"batch_size": 0}, "batch_size .* is 0; it must be a number from 1 up"),
        ({"batch_size": "8"}, "batch_size .* is '8'"),
        ({"device": "gpu"}, "device .* is 'gpu' .*cuda:1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_reward("pickscore", options)


@pytest.mark.usefixtures("no_plots")
def test_a_run_is_scored_by_it(folder: Path, runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    reward = f"--model.rewards={{pickscore: {{weight: 2.0, options: {{pretrained: {folder}, batch_size: 4}}}}}}"
    path = runs.fit("a", reward, "--trainer.max_steps=1")
    assert "pickscore" in json.loads((path / "calibration.json").read_text())["obtained_by"]["reward"]
    saved = (path / "config.yaml").read_text()
    assert f"pretrained: {folder}" in saved
    # Other options, other scores: a search does not go on with them.
    capsys.readouterr()
    other = reward.replace("batch_size: 4", "dtype: bfloat16")
    assert runs("fit", "a", other, f"--ckpt_path={path}/checkpoints/last.ckpt", "--trainer.max_steps=2") == 2
    assert "dtype=bfloat16" in capsys.readouterr().err
