"""Rewards: higher is better, one number a picture, and a failure is never a zero."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import FunctionReward, Reward, RewardError, RewardSet
from calibri_lightning.rewards.base import measure_checked
from calibri_lightning.rewards.finding import RewardConfig, find_reward
from calibri_lightning.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from calibri_lightning.shapes.captions import prompts as shapes_prompts

PROMPTS = tuple(Prompt(f"prompt {i}", i) for i in range(4))
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def constant(value: float) -> FunctionReward:
    return FunctionReward(f"constant{value}", lambda images, prompts: torch.full((len(images),), value))


def test_jpeg_rewards_order_flat_smooth_and_noisy_pictures() -> None:
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    pictures = torch.stack([torch.full((3, 32, 32), 0.5), ramp, 0.5 * ramp + 0.5 * noise, noise])
    large, small = JpegIncompressibility()(pictures, PROMPTS), JpegCompressibility()(pictures, PROMPTS)
    assert (large.diff() > 0).all()
    assert (small.diff() < 0).all()
    assert torch.equal(large, -small)
    assert 0 < large[0] < large[3] < 32 * 32 * 3 / 1000


def test_jpeg_reward_of_a_picture_does_not_depend_on_its_batch() -> None:
    scores = JpegIncompressibility()(IMAGES, PROMPTS)
    assert torch.equal(scores, torch.cat([JpegIncompressibility()(image[None], PROMPTS[:1]) for image in IMAGES]))


def test_the_sum_is_weighted_and_every_reward_is_reported() -> None:
    rewards = RewardSet.of((constant(2.0), 0.5), (constant(3.0), -1.0), (JpegCompressibility(), 0.0))
    scores = rewards.score(IMAGES, PROMPTS)
    assert torch.equal(scores.total, torch.full((4,), -2.0))
    assert tuple(scores.each) == rewards.names == ("constant2.0", "constant3.0", "jpeg_compressibility")
    assert torch.equal(scores.each["jpeg_compressibility"], JpegCompressibility()(IMAGES, PROMPTS))


def test_rewards_compute_in_their_own_precision_whatever_that_of_the_run() -> None:
    weights = torch.linspace(0.1, 1, IMAGES[0].numel())
    reward = RewardSet.of((FunctionReward("product", lambda images, prompts: images.flatten(1) @ weights), 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert (IMAGES.flatten(1) @ weights).dtype == torch.bfloat16
        scores = reward.score(IMAGES, PROMPTS)
    assert torch.equal(scores.total, IMAGES.flatten(1) @ weights)


def test_values_that_are_not_finite_become_nan_and_spread_to_the_sum_unless_their_weight_is_zero() -> None:
    broken = FunctionReward("broken", lambda images, prompts: torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]))
    optimised = RewardSet.of((broken, 1.0), (constant(1.0), 1.0)).score(IMAGES, PROMPTS)
    assert optimised.total.isnan().tolist() == [False, True, True, True]
    assert optimised.each["broken"].isnan().tolist() == [False, True, True, True]
    watched = RewardSet.of((broken, 0.0), (constant(1.0), 1.0)).score(IMAGES, PROMPTS)
    assert torch.equal(watched.total, torch.ones(4))


@pytest.mark.parametrize(
    "returned",
    [
        torch.zeros(3),
        torch.zeros(4, 1),
        torch.zeros(()),
        [0.0] * 4,
        None,
        1.0,
        torch.zeros(4, dtype=torch.complex64),
    ],
    ids=["short", "2d", "scalar", "list", "none", "float", "complex"],
)
def test_anything_but_one_number_a_picture_is_refused_by_name(returned: object) -> None:
    reward = FunctionReward("wrong", lambda images, prompts: returned)
    with pytest.raises(UserError, match=r"'wrong' returned .*shape \[4\]"):
        RewardSet.of((reward, 1.0)).score(IMAGES, PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_real_dtypes_are_accepted(dtype: torch.dtype) -> None:
    reward = FunctionReward(
        "typed",
        lambda images, prompts: torch.ones(len(images), dtype=dtype, requires_grad=dtype.is_floating_point),
    )
    scores = measure_checked(reward, IMAGES, PROMPTS)["typed"]
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert torch.equal(scores, torch.ones(4))


def test_a_reward_that_raises_is_named_with_its_cause() -> None:
    def raises(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(RewardError, match="'bad' raised ZeroDivisionError: division by zero") as caught:
        RewardSet.of((FunctionReward("bad", raises), 1.0)).score(IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert isinstance(caught.value, UserError)


class Twofold(Reward):
    name = "twofold"
    extra_names = ("twofold_hard",)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        soft = self(images, prompts)
        return {"twofold": soft, "twofold_hard": (soft > 0.5).float()}


def test_extra_metrics_are_reported_and_not_optimised() -> None:
    scores = RewardSet.of((Twofold(), 2.0)).score(IMAGES, PROMPTS)
    torch.testing.assert_close(scores.total, 2 * IMAGES.mean(dim=(1, 2, 3)))
    assert set(scores.each) == {"twofold", "twofold_hard"}
    forgetful = Twofold()
    forgetful.extra_names = ("twofold_hard", "never")
    with pytest.raises(UserError, match="'twofold' did not report never"):
        measure_checked(forgetful, IMAGES, PROMPTS)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("my_rewards")
    module.mean = lambda images, prompts: images.mean(dim=(1, 2, 3))
    module.Twofold, module.made, module.number = Twofold, Twofold(), 3
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return "my_rewards"


def test_rewards_are_found_by_name_and_by_import_path(module: str) -> None:
    assert isinstance(find_reward("jpeg_compressibility"), JpegCompressibility)
    assert isinstance(find_reward("my_rewards:Twofold"), Twofold)
    assert isinstance(find_reward("my_rewards:made"), Twofold)
    scores = RewardSet({"my_rewards:mean": 1.0, "jpeg_incompressibility": 0.0}).score(IMAGES, PROMPTS)
    assert torch.equal(scores.total, IMAGES.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jpeg_compresibility", "Did you mean 'jpeg_compressibility'"),
        ("pick", "built in are shapes"),
        ("my_rewards:absent", "cannot be imported"),
        ("no_such_module:mean", "cannot be imported.*PYTHONPATH"),
        (":mean", "cannot be imported"),
        ("my_rewards:number", "must be a Reward or a function"),
    ],
)
def test_names_that_cannot_be_found_are_refused(module: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardSet({name: 1.0})


class Shifted(Reward):
    name = "shifted"

    def __init__(self, by: float, sign: float = 1.0) -> None:
        self.by, self.sign = by, sign

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.sign * images.mean(dim=(1, 2, 3)) + self.by


def test_options_reach_the_class_and_stand_in_the_recipe(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[module], "Shifted", Shifted, raising=False)
    rewards = RewardSet(
        {f"{module}:Shifted": RewardConfig(2.0, {"sign": -1.0, "by": 3.0}), "jpeg_compressibility": RewardConfig(0.0)}
    )
    torch.testing.assert_close(rewards.score(IMAGES, PROMPTS).total, 6 - 2 * IMAGES.mean(dim=(1, 2, 3)))
    assert rewards.recipe == "2 shifted (by=3.0, sign=-1.0), 0 jpeg_compressibility"
    assert RewardSet({"jpeg_compressibility": 0.5}).recipe == "0.5 jpeg_compressibility"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Shifted", {"by": 1.0, "sing": 1.0}, r"no option 'sing'; it has by, sign. Did you mean 'sign'\?"),
        ("Shifted", {}, r"needs the option 'by'. Give it as my_rewards:Shifted: {weight: 1.0, options: {by: ...}}"),
        ("Twofold", {"by": 1.0}, "no option 'by'; it has none"),
        ("made", {"by": 1.0}, "is a Twofold and takes no options, but has by"),
        ("mean", {"by": 1.0}, "is a function and takes no options, but has by"),
    ],
)
def test_options_that_a_reward_does_not_take_are_refused(
    module: str, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, float], message: str
) -> None:
    monkeypatch.setattr(sys.modules[module], "Shifted", Shifted, raising=False)
    with pytest.raises(UserError, match=message):
        find_reward(f"{module}:{name}", options)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True])
def test_weights_must_be_finite_numbers(weight: float) -> None:
    with pytest.raises(UserError, match="weight of the reward 'jpeg_compressibility'"):
        RewardSet({"jpeg_compressibility": weight})


def test_something_must_be_optimised_and_names_must_differ() -> None:
    for rewards in ({}, {"jpeg_compressibility": 0.0}):
        with pytest.raises(UserError, match="nothing to optimise"):
            RewardSet(rewards)
    with pytest.raises(UserError, match="'twofold' is reported by two rewards"):
        RewardSet.of((Twofold(), 1.0), (Twofold(), 1.0))


def test_shapes_reward_prefers_the_picture_of_its_caption_and_reports_the_strict_score() -> None:
    from calibri_lightning.shapes.captions import Scene, prompts
    from calibri_lightning.shapes.render import place, render

    chosen = prompts("val")[:6]
    drawn = [render(place(Scene.from_metadata(p.metadata), 48, np.random.default_rng(p.index)), 48) for p in chosen]
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float()
    rewards = RewardSet({"shapes": 1.0})
    assert rewards.names == ("shapes", "shapes_strict")
    right, wrong = rewards.score(pictures, chosen), rewards.score(pictures.roll(1, dims=0), chosen)
    assert torch.equal(right.total, right.each["shapes"])
    assert set(right.each["shapes_strict"].tolist()) <= {0.0, 1.0}
    assert right.each["shapes_strict"].mean() > 0.8 > 0.2 > wrong.each["shapes_strict"].mean()
    assert (right.total > wrong.total + 0.2).all()


def test_shapes_reward_wants_a_scene() -> None:
    with pytest.raises(UserError, match="metadata .* describes no scene"):
        RewardSet({"shapes": 1.0}).score(IMAGES, PROMPTS)


def test_one_reward_twice_under_two_names() -> None:
    rewards = RewardSet({"shapes": 1.0, "again": RewardConfig(0.5, reward="shapes")})
    assert rewards.names == ("shapes", "shapes_strict", "again", "again_strict")
    scenes = list(shapes_prompts("val")[:2])
    scores = rewards.score(torch.rand(2, 3, 48, 48), scenes)
    assert torch.equal(scores.each["shapes_strict"], scores.each["again_strict"])
    torch.testing.assert_close(scores.total, 1.5 * scores.each["shapes"])
