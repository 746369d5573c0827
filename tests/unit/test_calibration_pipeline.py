from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from calibri_lightning.backbones import SD3
from calibri_lightning.calibration import (
    CalibrationFile,
    Layout,
    attach,
    build_layout,
    find_sites,
    fingerprint,
    fuse,
    load_calibration,
    unload_calibration,
    write_calibration,
)
from calibri_lightning.errors import UserError
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

PROMPTS = ["a red circle", "three green triangles"]
STEPS = 3


@pytest.fixture
def pipe() -> StableDiffusion3Pipeline:
    return build_pipeline(TINY)


def noise(pipe: StableDiffusion3Pipeline, count: int = 2) -> Tensor:
    size = TINY.image_size // 4
    shape = (count, pipe.transformer.config.in_channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def stock(pipe: StableDiffusion3Pipeline, guidance: float, **arguments: object) -> Tensor:
    """Latents of the pipeline as users call it."""
    result = pipe(
        prompt=PROMPTS,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        latents=noise(pipe),
        height=TINY.image_size,
        width=TINY.image_size,
        output_type="latent",
        **arguments,
    )
    return result.images


@torch.no_grad()
def reference(pipe: StableDiffusion3Pipeline, layout: Layout, theta: np.ndarray, guidance: float = 1.0) -> Tensor:
    """An independent sampler: one pass a member with its own scales, weighted, Euler steps written out.

    Where `layout` has no negative member and guidance is above 1, each side of the guidance is such a sum.
    """
    embeds, negative_embeds, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS)
    conditions = {"prompt": (embeds, pooled), "negative": (negative_embeds, negative_pooled)}
    rows = layout.rows(torch.from_numpy(theta)[None])
    attachment = attach(pipe.transformer, layout.sites)
    x = noise(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = pipe.scheduler.sigmas.tolist()

    def velocity(sigma: float, side: str | None) -> Tensor:
        total, time = torch.zeros_like(x), torch.full((len(x),), 1000 * sigma)
        for m, member in enumerate(layout.members):
            text, pool = conditions[side or member.prompt]
            with attachment.rows(rows.scales[0, m].expand(len(x), -1)):
                (out,) = pipe.transformer(x, text, pool, time, return_dict=False)
            total += rows.weights[0, m] * out
        return total

    for now, following in zip(sigmas, sigmas[1:], strict=False):
        if guidance > 1:
            negative = velocity(now, "negative")
            v = negative + guidance * (velocity(now, "prompt") - negative)
        else:
            v = velocity(now, None)
        x = x + (following - now) * v
    attachment.detach()
    return x


def perturbed(layout: Layout) -> np.ndarray:
    return layout.start + 0.3 * np.random.default_rng(5).standard_normal(layout.num_parameters)


def save(pipe: StableDiffusion3Pipeline, layout: Layout, theta: np.ndarray, path: Path) -> Path:
    file = CalibrationFile(
        names=layout.names,
        values=tuple(theta.tolist()),
        granularity=layout.granularity,
        members=layout.members,
        weight_mode=layout.weight_mode,
        model=fingerprint(pipe.transformer, "tiny"),
    )
    write_calibration(path / "calibration.json", file)
    return path / "calibration.json"


def layout_of(pipe: StableDiffusion3Pipeline, members, mode="raw", guidance: float = 4.0) -> Layout:
    return build_layout(find_sites(pipe.transformer), "gate", members, guidance_scale=guidance, weight_mode=mode)


@pytest.mark.parametrize("mode", ["raw", "guidance", "fixed"])
@pytest.mark.parametrize("called_with", [4.0, 7.0, 1.5])
def test_a_guided_calibration_equals_an_independent_two_pass_sampler(
    pipe, tmp_path: Path, mode: str, called_with: float
) -> None:
    layout = layout_of(pipe, "cfg", mode)
    theta = perturbed(layout)
    expected = reference(pipe, layout, theta)
    plain = stock(pipe, 4.0)
    load_calibration(pipe, save(pipe, layout, theta, tmp_path))
    assert torch.allclose(stock(pipe, called_with), expected, atol=2e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_the_stock_call_with_negative_prompts_draws_what_our_sampler_draws(pipe, tmp_path: Path) -> None:
    """Each prompt with a negative prompt of its own, the member of each pass, the learned weights; to the picture."""
    negatives, seeds = ["blurry", "a blue square beside a red one"], [3, 4]
    backbone, layout = SD3.of(build_pipeline(TINY)), layout_of(pipe, "cfg", "raw")
    theta = perturbed(layout)
    attachment = attach(backbone.transformer, layout.sites)
    samples = backbone.sample(
        attachment,
        layout.rows(torch.from_numpy(theta)[None].expand(2, -1)),
        layout.members,
        backbone.encode(PROMPTS),
        backbone.encode(negatives, negative=True),
        backbone.noise(seeds),
        STEPS,
    )
    load_calibration(pipe, save(pipe, layout, theta, tmp_path))

    def drawn(negative_prompt: list[str] | None) -> Tensor:
        options = {"num_inference_steps": STEPS, "height": TINY.image_size, "width": TINY.image_size}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = {"negative_prompt": negative_prompt, "generator": generators, "output_type": "pt", **options}
        return pipe(PROMPTS, guidance_scale=5.5, **call).images

    expected = backbone.decode(samples.latents)
    assert torch.allclose(drawn(negatives), expected, atol=2e-5)
    assert not torch.allclose(drawn(None), expected, atol=1e-3), "the negative prompts matter"


@pytest.mark.parametrize("members", ["single", 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_single_and_ensemble_equal_the_reference_with_and_without_guidance(
    pipe, tmp_path: Path, members, guidance: float
) -> None:
    layout = layout_of(pipe, members)
    theta = perturbed(layout)
    expected = reference(pipe, layout, theta, guidance)
    load_calibration(pipe, save(pipe, layout, theta, tmp_path))
    assert torch.allclose(stock(pipe, guidance), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [4.0, 4.7])
@pytest.mark.parametrize(
    ("members", "mode"), [("cfg", "raw"), ("cfg", "guidance"), ("cfg", "fixed"), ("single", "raw")]
)
def test_untouched_values_give_bit_identical_pictures(pipe, tmp_path: Path, dtype, guidance, members, mode) -> None:
    pipe.to(dtype)
    plain = pipe(
        PROMPTS,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        latents=noise(pipe).to(dtype),
        output_type="np",
    )
    layout = layout_of(pipe, members, mode, guidance)
    load_calibration(pipe, save(pipe, layout, layout.start, tmp_path))
    same = pipe(
        PROMPTS,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        latents=noise(pipe).to(dtype),
        output_type="np",
    )
    assert np.array_equal(plain.images, same.images)


@pytest.mark.parametrize("members", ["cfg", 2])
def test_unloading_gives_the_stock_pipeline_back(pipe, tmp_path: Path, members) -> None:
    plain = stock(pipe, 4.0)
    layout = layout_of(pipe, members)
    path = save(pipe, layout, perturbed(layout), tmp_path)
    for _ in range(2):
        assert not torch.equal(stock(load_calibration(pipe, path), 4.0), plain)
        assert torch.equal(stock(unload_calibration(pipe), 4.0), plain)


def test_the_batch_size_may_change_between_calls(pipe, tmp_path: Path) -> None:
    layout = layout_of(pipe, "cfg")
    load_calibration(pipe, save(pipe, layout, perturbed(layout), tmp_path))

    def latents(count: int) -> Tensor:
        arguments = {"num_inference_steps": STEPS, "latents": noise(pipe)[:count], "output_type": "latent"}
        return pipe(PROMPTS[:count], guidance_scale=4.0, **arguments).images

    two, one, again = latents(2), latents(1), latents(2)
    assert torch.equal(two, again)
    assert torch.allclose(two[:1], one, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("mode", ["fixed", "raw"])
def test_fused_equals_hooked_and_survives_saving(pipe, tmp_path: Path, guidance: float, mode: str) -> None:
    layout = layout_of(pipe, "single", mode)
    load_calibration(pipe, save(pipe, layout, perturbed(layout), tmp_path))
    hooked = stock(pipe, guidance)
    assert fuse(pipe) is pipe
    fused = stock(pipe, guidance)
    assert ((fused - hooked).norm() / hooked.norm()).item() < 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    again = save(pipe, layout, perturbed(layout), tmp_path)
    refused(lambda: load_calibration(pipe, again), "hold a fused calibration.*from_pretrained")
    refused(lambda: unload_calibration(pipe), "fused into its weights, for good")
    pipe.save_pretrained(tmp_path / "fused")
    loaded = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "fused", text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(stock(loaded, guidance), fused)


@pytest.mark.parametrize(("members", "kind"), [("cfg", "a guided pair"), (2, "an ensemble")])
def test_several_members_cannot_be_fused_and_keep_their_hooks(pipe, tmp_path: Path, members, kind: str) -> None:
    layout = layout_of(pipe, members)
    load_calibration(pipe, save(pipe, layout, perturbed(layout), tmp_path))
    before = stock(pipe, 4.0)
    with pytest.raises(UserError, match=rf"{kind}.*each with its own scales.*Keep the hooks"):
        fuse(pipe)
    assert torch.equal(stock(pipe, 4.0), before)


def test_a_guided_calibration_refuses_calls_it_has_no_weights_for(pipe, tmp_path: Path) -> None:
    layout = layout_of(pipe, "cfg")
    load_calibration(pipe, save(pipe, layout, layout.start, tmp_path))
    with pytest.raises(UserError, match=r"guidance_scale 1, which switches guidance off.*above 1"):
        stock(pipe, 1.0)
    with pytest.raises(UserError, match="skip_guidance_layers"):
        stock(pipe, 4.0, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0, skip_layer_guidance_start=0.0)


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_wrong_uses_are_refused(pipe, tmp_path: Path) -> None:
    layout = layout_of(pipe, "cfg")
    path = save(pipe, layout, layout.start, tmp_path)
    refused(
        lambda: load_calibration(pipe.transformer, path),
        "given a SD3Transformer2DModel.*whole diffusers pipeline",
    )
    refused(lambda: unload_calibration(pipe), "unload_calibration was called on a pipeline without")
    refused(lambda: fuse(pipe), "fuse was called on a pipeline without a calibration")
    refused(lambda: load_calibration(pipe, tmp_path / "none.json"), "There is no calibration")
    other = build_pipeline(type(TINY)(**{**TINY.__dict__, "num_layers": 4}))
    refused(lambda: load_calibration(other, path), "made for tiny .* of another architecture or size")
    load_calibration(pipe, path)
    refused(lambda: load_calibration(pipe, path), "has a calibration already")
