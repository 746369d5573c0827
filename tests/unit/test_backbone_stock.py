"""The stock backbone: which forward sees which prompt, the same pictures as a native backbone, and refusals."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from sampling_tools import draw

from calibri_lightning.assembly import CalibrationConfig, assemble
from calibri_lightning.backbones import FLUX1, SD3, Stock
from calibri_lightning.backbones.native import Native
from calibri_lightning.backbones.stock_call import StockCall
from calibri_lightning.backbones.stock_passes import find_passes
from calibri_lightning.calibration.attach import attach
from calibri_lightning.calibration.scales import Layout, Rows, build_layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import FunctionReward
from calibri_lightning.rewards.combine import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.frames import middle_frame
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

PROMPTS, NEGATIVES, SEEDS = ["a red circle", "two green squares"], ["", "a red circle"], [3, 2**62 + 5]
UNGUIDED = {"guidance_scale": 1.0}


@cache
def _pristine() -> DiffusionPipeline:
    return build_pipeline(TINY)


def sd3() -> DiffusionPipeline:
    return copy.deepcopy(_pristine())


def flux1() -> DiffusionPipeline:
    return tiny.fresh(tiny.flux1)


def scaled(backbone: Native | Stock, layout: Layout, theta: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Pictures of both prompts, each with scales of its own."""
    attachment = attach(backbone.transformer, layout.sites)
    guided = len(layout.members) == 2
    try:
        samples = backbone.sample(
            attachment,
            layout.rows(theta),
            layout.members,
            backbone.encode(PROMPTS),
            backbone.encode(NEGATIVES, negative=True) if guided else None,
            backbone.noise(SEEDS),
            3,
        )
    finally:
        attachment.detach()
    return backbone.decode(samples.latents), samples.num_forwards


def random_theta(layout: Layout) -> torch.Tensor:
    noise = torch.randn(len(SEEDS), layout.num_parameters, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(layout.start.copy()).float() + 0.3 * noise


@pytest.mark.parametrize(
    ("build", "native", "size", "members", "arguments"),
    [
        (sd3, SD3, (16, 16), "cfg", {}),
        (sd3, SD3, (8, 16), "single", UNGUIDED),
        (flux1, FLUX1, (8, 12), "cfg", {}),
        (flux1, FLUX1, (8, 12), "single", {}),
    ],
    ids=["sd3-cfg", "sd3-single", "flux1-cfg", "flux1-single"],
)
def test_scaled_pictures_equal_those_of_the_native_backbone(build, native, size, members, arguments) -> None:
    stock, own = Stock.of(build(), *size, arguments=arguments), native.of(build(), *size)
    layout = build_layout(find_sites(own.transformer), "gate", members, 2.5, "fixed")
    theta = random_theta(layout)
    pictures, num_forwards = scaled(stock, layout, theta)
    expected, expected_forwards = scaled(own, layout, theta)
    assert num_forwards == expected_forwards
    torch.testing.assert_close(pictures, expected, rtol=0, atol=2e-5)
    untouched, _ = scaled(own, layout, torch.from_numpy(layout.start.copy())[None].expand(2, -1))
    assert (expected - untouched).abs().max() > 1e-3
    assert torch.equal(scaled(stock, layout, theta)[0], pictures)


@pytest.mark.parametrize(
    ("build", "guidance", "passes"),
    [
        (tiny.flux1, {"true_cfg_scale": 2.0, "negative_prompt": ""}, (("prompt",), ("negative",))),
        (tiny.qwen_image, {"true_cfg_scale": 2.0, "negative_prompt": ""}, (("prompt",), ("negative",))),
        (tiny.flux2_klein, {"guidance_scale": 2.0}, (("prompt",), ("negative",))),
        (tiny.z_image, {"guidance_scale": 2.0}, (("prompt", "negative"),)),
        (tiny.lumina2, {"guidance_scale": 2.0}, (("prompt",), ("negative",))),
        (tiny.krea2, {"guidance_scale": 2.0}, (("prompt",), ("negative",))),
        (sd3, {"guidance_scale": 2.0}, (("negative", "prompt"),)),
        (sd3, {"guidance_scale": 1.0}, (("prompt",),)),
        (tiny.z_image, {"guidance_scale": 0.0}, (("prompt",),)),
    ],
)
def test_the_forwards_of_each_way_to_guide_are_recognised(build, guidance, passes) -> None:
    pipe = build() if build is sd3 else tiny.fresh(build)
    side = 32 if build is tiny.lumina2 else 8

    def run(prompt: str, num_steps: int) -> None:
        pipe(
            prompt=prompt,
            height=side,
            width=side,
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **guidance,
        )

    assert find_passes(pipe.transformer, run) == passes


def test_a_pipeline_whose_steps_differ_is_refused() -> None:
    transformer = torch.nn.Linear(2, 2)

    def run(prompt: str, num_steps: int) -> None:
        for _ in range(2 * num_steps - 1):
            transformer(torch.full((1, 2), float(ord(prompt))))

    with pytest.raises(UserError, match="3 times in 2 steps"):
        find_passes(transformer, run)


def test_forwards_that_see_no_prompt_or_several_are_refused() -> None:
    transformer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"0 row\(s\) with the prompt and 1 without"):
        find_passes(transformer, lambda prompt, n: [transformer(torch.zeros(1, 2)) for _ in range(n)] and None)
    several = [lambda prompt, n: [transformer(torch.full((3, 2), float(ord(prompt)))) for _ in range(n)] and None]
    with pytest.raises(UserError, match=r"3 row\(s\) with the prompt and 0 without"):
        find_passes(transformer, several[0])


def test_members_must_match_the_forwards_of_the_pipeline() -> None:
    with pytest.raises(UserError, match="members is single, but the pipeline runs a negative prompt"):
        draw(Stock.of(sd3()), [1], [PROMPTS[0]])
    with pytest.raises(
        UserError, match=r"members is cfg, but the pipeline runs no negative prompt at guidance_scale 1:"
    ):
        draw(Stock.of(sd3()), [1], [PROMPTS[0]], [""], [[1.0, 0.0]])


@pytest.mark.parametrize(("members", "mode"), [(3, "raw"), ("cfg", "raw"), ("cfg", "guidance"), ("single", "raw")])
def test_what_needs_another_formula_than_the_pipelines_is_refused(members, mode) -> None:
    with pytest.raises(UserError, match=f"members: {members}, weight_mode: {mode} .*weight_mode: fixed"):
        assemble(Stock.of(sd3()), CalibrationConfig("block", members, 3.0, mode))


def test_a_model_without_guidance_takes_no_negative_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StockCall, "guidance_argument", None)
    with pytest.raises(UserError, match="StableDiffusion3Pipeline takes no guidance scale"):
        Stock.of(sd3()).check_members("cfg", "fixed")
    monkeypatch.undo()
    klein = Stock.of(tiny.fresh(tiny.flux2_klein), 8, 8)
    with pytest.raises(UserError, match="negative prompt is 'blurry', but Flux2KleinPipeline takes none"):
        draw(klein, [1], [PROMPTS[0]], ["blurry"], [[2.0, -1.0]])


def test_the_probe_finds_the_sites_that_a_native_backbone_finds() -> None:
    config = CalibrationConfig("gate", "cfg", 3.0, "fixed")
    layouts = []
    for backbone in (Stock.of(sd3()), SD3.of(sd3())):
        layout, attachment = assemble(backbone, config)
        attachment.detach()
        layouts.append(layout)
    assert layouts[0] == layouts[1]


def test_the_evaluator_scores_candidates_as_with_the_native_backbone() -> None:
    prompts = [Prompt(index=i, text=text) for i, text in enumerate(PROMPTS)]
    redness = FunctionReward("redness", lambda images, prompts: images[:, 0].mean(dim=(1, 2)))
    results = []
    for backbone in (Stock.of(sd3()), SD3.of(sd3())):
        layout, attachment = assemble(backbone, CalibrationConfig("layer", "cfg", 3.0, "fixed"))
        evaluator = Evaluator(backbone, attachment, layout, RewardSet.of((redness, 1.0)), 4)
        thetas = random_theta(layout).double().numpy()
        results.append(evaluator.evaluate(thetas, prompts, SEEDS, 2))
        attachment.detach()
    assert results[0].num_forwards == results[1].num_forwards == 2 * 2 * 2 * 2
    np.testing.assert_allclose(results[0].rewards, results[1].rewards, rtol=0, atol=1e-5)


def test_each_text_is_encoded_once_and_a_change_in_place_does_not_reach_the_memory() -> None:
    pipe, calls = sd3(), []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    backbone = Stock.of(pipe, arguments=UNGUIDED)
    draw(backbone, [1], PROMPTS[:1])
    known = len(calls)
    first = draw(backbone, [1, 2, 3], [PROMPTS[0]] * 3).latents
    assert len(calls) == known
    embeddings = pipe.encode_prompt(prompt="a", prompt_2=None, prompt_3=None)
    embeddings[0].zero_()
    assert pipe.encode_prompt(prompt="a", prompt_2=None, prompt_3=None)[0].any()
    assert torch.equal(draw(backbone, [1], PROMPTS[:1]).latents, first[:1])


@pytest.mark.parametrize("build", [tiny.wan, tiny.ltx])
def test_a_video_pipeline_gives_the_frames_of_its_own_call(build) -> None:
    backbone = Stock.of(tiny.fresh(build), 32, 64, num_frames=3)
    videos = draw(backbone, SEEDS, PROMPTS, NEGATIVES, [[2.0, -1.0]] * 2, num_steps=2)
    assert videos.latents.shape == (2, 3, 3, 32, 64)
    assert videos.num_forwards == 2 * 2 * 2
    assert torch.equal(backbone.decode(videos.latents), videos.latents)
    expected = tiny.fresh(build)(
        prompt=PROMPTS[0],
        negative_prompt=NEGATIVES[0],
        height=32,
        width=64,
        num_frames=3,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(SEEDS[0]),
        output_type="pt",
    ).frames
    assert torch.equal(videos.latents[:1], expected)


def test_a_number_of_frames_that_the_pipeline_rounds_is_refused() -> None:
    rounded = Stock.of(tiny.fresh(tiny.wan), 16, 32, num_frames=4, arguments=UNGUIDED)
    with pytest.raises(UserError, match=r"4 frames were asked for, but WanPipeline makes 5\. Set num_frames to 5\."):
        draw(rounded, SEEDS[:1], PROMPTS[:1], num_steps=1)


def test_a_reward_gets_the_middle_frame_unless_it_takes_videos() -> None:
    def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return images.flatten(1).mean(dim=1)

    videos = torch.rand(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt(index=i, text=text) for i, text in enumerate(PROMPTS)]
    one = RewardSet.of((FunctionReward("one", brightness), 1.0)).score(videos, prompts).total
    torch.testing.assert_close(one, videos[:, 2].flatten(1).mean(dim=1))
    brightness.takes_frames = True  # type: ignore[attr-defined]
    every = RewardSet.of((FunctionReward("every", brightness), 1.0)).score(videos, prompts).total
    torch.testing.assert_close(every, videos.flatten(1).mean(dim=1))
    assert (one - every).abs().max() > 1e-4
    assert torch.equal(middle_frame(videos[:, 0]), videos[:, 0])


def test_unusable_pipelines_are_refused() -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    for scheduler in (
        DDIMScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ):
        pipe = sd3()
        pipe.scheduler = scheduler
        with pytest.raises(UserError, match=f"scheduler is {type(scheduler).__name__}; Stock takes deterministic"):
            Stock.of(pipe)
    twofold = tiny.fresh(tiny.wan)
    twofold.transformer_2 = twofold.transformer
    with pytest.raises(UserError, match="WanPipeline has two transformers"):
        Stock.of(twofold, 16, 16)
    headless = sd3()
    headless.transformer = None
    with pytest.raises(UserError, match="lacks a transformer"):
        Stock.of(headless)


def test_sizes_and_arguments_are_checked() -> None:
    assert Stock.of(sd3()).image_size == (16, 16)
    with pytest.raises(UserError, match=r"height is 9; .*multiples of 4\. Set height to 8\."):
        Stock.of(sd3(), 9, 16)
    # The autoencoder could, the transformer's patches cannot: the pipeline itself says so.
    with pytest.raises(UserError, match="StableDiffusion3Pipeline refuses its call .*divisible by 8"):
        draw(Stock.of(sd3(), 12, 16, arguments=UNGUIDED), [1], [PROMPTS[0]])
    with pytest.raises(UserError, match="'latents'; Stock sees to that one itself"):
        Stock.of(sd3(), arguments={"latents": 1})
    with pytest.raises(UserError, match="'guidance'; StableDiffusion3Pipeline has no such argument"):
        Stock.of(sd3(), arguments={"guidance": 1.0})
    with pytest.raises(UserError, match="num_frames is 5, but StableDiffusion3Pipeline makes pictures"):
        Stock.of(sd3(), num_frames=5)


def test_strategies_that_need_velocities_are_refused() -> None:
    backbone = Stock.of(sd3())
    for ask in (
        lambda: backbone.velocity(torch.zeros(1), torch.ones(1), backbone.encode([""])),
        lambda: backbone.schedule(3),
        backbone.latent_shape,
    ):
        with pytest.raises(UserError, match="CMAES and PairES"):
            ask()


def test_it_loads_any_pipeline_class(tmp_path: Path) -> None:
    tiny.fresh(tiny.z_image).save_pretrained(tmp_path / "z")
    loaded = Stock(str(tmp_path / "z"), "float32", height=8, width=8, arguments={"guidance_scale": 0.0})
    expected = draw(Stock.of(tiny.fresh(tiny.z_image), 8, 8, arguments={"guidance_scale": 0.0}), [1], [PROMPTS[0]])
    assert torch.equal(draw(loaded, [1], [PROMPTS[0]]).latents, expected.latents)


def test_unequal_scales_of_prompt_and_negative_reach_their_own_rows() -> None:
    """Scaling the negative row alone must change guided pictures and scaling nothing must not."""
    stock = Stock.of(sd3())
    sites = find_sites(stock.transformer)
    layout = build_layout(sites, "block", "cfg", 3.0, "fixed")
    attachment = attach(stock.transformer, sites)
    scales = torch.ones(2, 2, len(sites))
    scales[1, 1] = 1.2
    samples = stock.sample(
        attachment,
        Rows(scales, torch.tensor([[3.0, -2.0]] * 2)),
        layout.members,
        stock.encode([PROMPTS[0]] * 2),
        stock.encode([""] * 2, negative=True),
        stock.noise([7, 7]),
        2,
    )
    attachment.detach()
    plain = draw(stock, [7], [PROMPTS[0]], [""], [[3.0, -2.0]], num_steps=2).latents
    assert torch.equal(samples.latents[:1], plain)
    assert (samples.latents[1] - plain[0]).abs().max() > 1e-4
