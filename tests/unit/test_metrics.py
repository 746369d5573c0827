"""Rewards and structural similarity as metrics: means of what is finite, in a loop of anybody's."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import lightning
import pytest
import torch
from metric_tools import RedReward, flat
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.image import StructuralSimilarityIndexMeasure

from calibri_lightning.errors import UserError
from calibri_lightning.metrics import PictureChange, RewardMetric
from calibri_lightning.metrics.pictures import to_bytes, to_float
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet


def noise(count: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_of_the_reward_over_uneven_batches() -> None:
    images, texts = noise(7), [f"prompt {number}" for number in range(7)]
    metric = RewardMetric("jpeg_compressibility")
    for part in (slice(0, 4), slice(4, 6), slice(6, 7)):
        metric.update(images[part], texts[part])
    prompts = [Prompt(text, index) for index, text in enumerate(texts)]
    scores = RewardSet({"jpeg_compressibility": 1.0}).score(images, prompts).total
    torch.testing.assert_close(metric.compute(), scores.double().mean().float(), rtol=0, atol=0)
    metric.reset()
    assert metric.compute().isnan()


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    metric = RewardMetric(RedReward())
    assert metric(flat(torch.full((1, 3), 0.25)), ["a"]) == 0.25
    assert metric(flat(torch.full((3, 3), 0.75)), ["a"] * 3) == 0.75
    assert metric.compute() == (0.25 + 3 * 0.75) / 4


def test_what_cannot_be_scored_is_counted_and_left_out() -> None:
    images = flat(torch.tensor([[0.5] * 3, [0.25] * 3, [1.0] * 3]))
    metric = RewardMetric(RedReward(), extras=True)
    metric.update(images, ["a", "nan", "b"])
    assert metric.compute() == {"red": 0.75, "green": pytest.approx(7 / 12), "red_failed": 1, "green_failed": 0}
    # A picture that is none fails in all scores, and spoils no other one.
    broken = images.clone()
    broken[0, 2, 3, 3] = torch.nan
    broken[1, 0, 0, 0] = torch.inf
    metric.reset()
    metric.update(broken, ["a", "b", "c"])
    assert metric.compute() == {"red": 1.0, "green": 1.0, "red_failed": 2, "green_failed": 2}


def test_a_mean_over_nothing_is_nan_and_not_zero() -> None:
    metric = RewardMetric(RedReward())
    metric.update(noise(2), ["nan", "nan"])
    assert metric.compute().isnan()
    assert metric.failed.tolist() == [2, 0]
    empty = RewardMetric(RedReward())
    empty.update(noise(0), [])
    assert empty.compute().isnan()


def test_bytes_and_floats_are_the_same_pictures() -> None:
    values = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_bytes(to_float(values)), values)
    metrics = [RewardMetric("jpeg_incompressibility") for _ in range(2)]
    metrics[0].update(values, ["a"] * 3)
    metrics[1].update(values.double() / 255, ["a"] * 3)
    assert metrics[0].compute() == metrics[1].compute()


def test_videos_are_taken_by_their_middle_frame() -> None:
    video = flat(torch.tensor([[0.0] * 3, [0.5] * 3, [1.0] * 3]))[None]
    metric = RewardMetric(RedReward())
    metric.update(video, ["a"])
    assert metric.compute() == 0.5


def test_prompts_bring_their_metadata_and_are_checked() -> None:
    reward = RedReward()
    metric = RewardMetric(reward)
    for _ in range(3):
        metric.update(noise(2), [Prompt("a", 5, {"count": 2}), "b"])
    assert reward.checked == 6
    assert reward is metric.reward


@pytest.mark.parametrize(
    ("images", "prompts", "words"),
    [
        (noise(2), ["a"], "2 pictures and 1 of prompts"),
        (noise(1), "a", "one text of prompts"),
        (noise(2)[0], ["a"] * 3, "the rule is"),
        (noise(2)[:, :1], ["a"] * 2, "the rule is"),
        (noise(2) * 2 - 1, ["a"] * 2, r"\(images \+ 1\) / 2"),
        (noise(2) * 255, ["a"] * 2, "values from"),
        ((noise(2) * 255).int(), ["a"] * 2, "int32"),
        ([1, 2], ["a"] * 2, "list"),
    ],
)
def test_wrong_pictures_and_prompts_are_refused(images: Tensor, prompts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RewardMetric(RedReward()).update(images, prompts)


def test_wrong_rewards_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="jpeg_compressibility"):
        RewardMetric("jpeg_compresibility")
    with pytest.raises(UserError, match="cannot take options"):
        RewardMetric(RedReward(), {"scale": 2.0})


def test_copies_share_the_reward_and_pickles_make_it_anew() -> None:
    metric = RewardMetric("metric_tools:RedReward", {"scale": 2.0})
    metric.update(flat(torch.full((1, 3), 0.25)), ["a"])
    for twin in (metric.clone(), copy.deepcopy(metric)):
        assert twin.reward is metric.reward
        assert twin.compute() == 0.5
        twin.update(flat(torch.full((1, 3), 0.5)), ["a"])
    assert metric.compute() == 0.5, "states are each copy's own"
    loaded = pickle.loads(pickle.dumps(metric))
    assert loaded.reward is not metric.reward
    assert loaded.reward.checked == 0
    assert loaded.compute() == 0.5
    loaded.update(flat(torch.full((1, 3), 0.75)), ["a"])
    assert loaded.compute() == 1.0


def test_it_goes_into_a_collection() -> None:
    both = MetricCollection({"red": RewardMetric(RedReward()), "jpeg": RewardMetric("jpeg_compressibility")})
    both.update(noise(2), ["a", "b"])
    found = both.compute()
    assert set(found) == {"red", "jpeg"}
    assert found["red"] > 0 > found["jpeg"]


def test_rewards_of_a_collection_stay_apart_when_they_begin_alike() -> None:
    """torchmetrics takes metrics with equal states after the first batch for one."""
    one, two = RewardMetric("metric_tools:RedReward"), RewardMetric("metric_tools:RedReward", {"scale": 2.0})
    both = MetricCollection({"one": one, "two": two, "same": RewardMetric("metric_tools:RedReward")})
    both.update(flat(torch.zeros(1, 3)), ["a"])
    both.update(flat(torch.full((1, 3), 0.5)), ["a"])
    found = both.compute()
    assert (found["one"], found["two"], found["same"]) == (0.25, 0.5, 0.25)


def test_half_precision_of_the_loop_does_not_reach_the_reward() -> None:
    metric = RewardMetric(RedReward())
    images = noise(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(images, ["a", "b"])
    metric.half()
    assert metric.total.dtype == torch.float64
    torch.testing.assert_close(metric.compute(), images[:, 0].mean())


class SomebodysModel(lightning.LightningModule):
    """Knows nothing of this package but the metric."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.reward = RewardMetric(RedReward())
        self.change = PictureChange()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.reward.update(batch, ["nan" if index == 0 else "a"] * len(batch))
        self.change.update(batch, batch)
        self.log("red", self.reward, on_epoch=True)
        self.log("change", self.change, on_epoch=True)


def test_in_a_lightning_module_of_somebody_else(tmp_path: Path) -> None:
    images = noise(7)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    model = SomebodysModel()
    for _ in range(2):
        [found] = trainer.validate(model, torch.utils.data.DataLoader(images, batch_size=3), verbose=False)
        # The first three failed; the mean is over pictures, not over batches of 3 and 1.
        assert found["red"] == pytest.approx(float(images[3:, 0].mean()))
        assert found["change"] == pytest.approx(1)


def test_change_is_torchmetrics_ssim_of_all_pictures() -> None:
    images, base = noise(5), noise(5, seed=1)
    mixed = (0.8 * base + 0.2 * images).clamp(0, 1)
    metric, reference = PictureChange(), StructuralSimilarityIndexMeasure(data_range=1.0)
    for part in (slice(0, 4), slice(4, 5)):
        metric.update(mixed[part], base[part])
    reference.update(mixed, base)
    torch.testing.assert_close(metric.compute(), reference.compute())
    assert 0 < metric.compute() < 1
    metric.reset()
    metric.update(to_bytes(base), to_bytes(base))
    assert metric.compute() == pytest.approx(1)


def test_change_of_flat_pictures_in_closed_form() -> None:
    """Without structure, SSIM is (2ab + c1) / (a^2 + b^2 + c1), c1 = 0.01^2 (Wang et al., 2004, equation 6)."""
    metric = PictureChange()
    metric.update(flat(torch.full((2, 3), 0.25)), flat(torch.full((2, 3), 0.5)))
    expected = (2 * 0.25 * 0.5 + 1e-4) / (0.25**2 + 0.5**2 + 1e-4)
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-4)


def test_change_leaves_out_broken_pictures_and_refuses_wrong_ones() -> None:
    metric = PictureChange()
    broken = noise(2)
    broken[0, 0, 3, 3] = torch.nan
    metric.update(broken, noise(2))
    assert metric.compute() == pytest.approx(1)
    assert metric.failed == 1
    with pytest.raises(UserError, match="same prompt and noise"):
        metric.update(noise(2), noise(3))
    with pytest.raises(UserError, match="window of 11"):
        metric.update(noise(2, side=8), noise(2, side=8))
    assert math.isnan(PictureChange().compute())
