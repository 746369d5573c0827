"""Every native backbone is the stock pipeline, whatever the batch around a picture (SD3 has a file of its own)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from sampling_tools import draw
from torch import Tensor

from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Krea2, Lumina2, QwenImage, ZImage
from calibri_lightning.backbones.native import Native
from calibri_lightning.errors import UserError

# Of different length, so that a batch pads the shorter one.
PROMPTS = ["a red circle", "two green squares below a blue triangle", "q"]
NEGATIVES = ["", "blurry", "a red circle beside a green one"]
SEEDS = [3, 2**62 + 5, 4]


@dataclass(frozen=True)
class Case:
    """A family, and how its stock pipeline is called."""

    backbone: type[Native]
    build: Callable[..., DiffusionPipeline]
    multiple: int
    size: tuple[int, int]
    largest: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, float] = field(default_factory=dict)
    guidance: str = ""
    """Argument of the stock call that turns classifier-free guidance on; none where the model has none."""
    takes_negative: bool = True
    latents: Callable[[Native, Tensor], Tensor] = lambda backbone, x: x
    """From the backbone's latents to those that the stock call returns."""

    def pipe(self) -> DiffusionPipeline:
        return tiny.fresh(self.build, **self.options)

    def make(self) -> Native:
        return self.backbone.of(self.pipe(), *self.size)

    def stock(self, output_type: str, guidance: float | None = None, rows: slice = slice(None)) -> Tensor:
        """The stock call, which draws the noise itself."""
        arguments: dict[str, Any] = dict(self.unguided)
        if guidance is not None:
            arguments[self.guidance] = guidance
            if self.takes_negative:
                arguments["negative_prompt"] = NEGATIVES[rows]
        return self.pipe()(
            prompt=PROMPTS[rows],
            height=self.size[0],
            width=self.size[1],
            num_inference_steps=3,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[rows]],
            output_type=output_type,
            **arguments,
        ).images


def unpacked_by_the_pipeline(backbone: Native, x: Tensor) -> Tensor:
    """FLUX.1, Qwen-Image: the stock pipeline packs with its own code."""
    pipe, (height, width) = backbone.pipeline, x.shape[-2:]
    return pipe._pack_latents(x, len(x), x.shape[1], height, width)


def decoded_statistics(backbone: Native, x: Tensor) -> Tensor:
    """FLUX.2-klein returns latents as its autoencoder takes them."""
    vae = backbone.pipeline.vae
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return backbone.pipeline._unpatchify_latents(x * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1))


CASES = {
    "flux1-dev": Case(FLUX1, tiny.flux1, 4, (8, 12), guidance="true_cfg_scale", latents=unpacked_by_the_pipeline),
    "flux1-schnell": Case(
        FLUX1, tiny.flux1, 4, (8, 4), options={"guidance_embeds": False}, latents=unpacked_by_the_pipeline
    ),
    "flux2-dev": Case(FLUX2, tiny.flux2_dev, 4, (8, 12), latents=lambda _, x: x.flatten(2).transpose(1, 2)),
    "flux2-klein": Case(
        FLUX2,
        tiny.flux2_klein,
        4,
        (8, 12),
        unguided={"guidance_scale": 1.0},
        guidance="guidance_scale",
        takes_negative=False,
        latents=decoded_statistics,
    ),
    "qwen-image": Case(
        QwenImage,
        tiny.qwen_image,
        4,
        (8, 12),
        unguided={"true_cfg_scale": 1.0},
        guidance="true_cfg_scale",
        latents=unpacked_by_the_pipeline,
    ),
    "z-image": Case(ZImage, tiny.z_image, 4, (8, 12), 64, unguided={"guidance_scale": 0.0}, guidance="guidance_scale"),
    "lumina2": Case(
        Lumina2, tiny.lumina2, 16, (32, 48), 256, unguided={"guidance_scale": 1.0}, guidance="guidance_scale"
    ),
    "krea2": Case(
        Krea2,
        tiny.krea2,
        4,
        (8, 12),
        unguided={"guidance_scale": 0.0},
        guidance="guidance_scale",
        latents=unpacked_by_the_pipeline,
    ),
    "krea2-turbo": Case(
        Krea2,
        tiny.krea2,
        4,
        (8, 8),
        options={"distilled": True},
        unguided={"guidance_scale": 0.0},
        latents=unpacked_by_the_pipeline,
    ),
}
every_family = pytest.mark.parametrize("name", CASES)
every_guided = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.guidance])


@cache
def shared(name: str) -> Native:
    return CASES[name].make()


def pair(backbone: Native, guidance: float) -> list[float]:
    """Weights of prompt and negative prompt for the guidance scale of a configuration."""
    plain = backbone.plain_guidance(guidance)
    return [plain, 1.0 - plain]


@every_family
def test_latents_and_pictures_equal_those_of_the_stock_call(name: str) -> None:
    case, backbone = CASES[name], shared(name)
    native = draw(backbone, SEEDS, PROMPTS).latents
    expected = case.stock("latent")
    assert (native - backbone.noise(SEEDS)).abs().max() > 0.05
    torch.testing.assert_close(case.latents(backbone, native), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(backbone.decode(native), case.stock("pt"), rtol=0, atol=3e-6)


@every_guided
def test_guided_latents_equal_those_of_the_stock_call_at_the_same_guidance_scale(name: str) -> None:
    case, backbone = CASES[name], shared(name)
    weights = pair(backbone, 2.5)
    negatives = NEGATIVES if case.takes_negative else [""] * len(PROMPTS)
    native = draw(backbone, SEEDS, PROMPTS, negatives, [weights] * len(SEEDS))
    unguided = draw(backbone, SEEDS, PROMPTS).latents
    assert (native.latents - unguided).abs().max() > 1e-3
    assert native.num_forwards == 3 * 2 * len(SEEDS)
    # Guidance multiplies the rounding of both forwards by up to 2g - 1.
    atol = 2e-6 * weights[0]
    torch.testing.assert_close(
        case.latents(backbone, native.latents), case.stock("latent", guidance=2.5), rtol=0, atol=atol
    )


@every_family
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    case, backbone = CASES[name], shared(name)
    guided = [pair(backbone, 2.5)] if case.guidance else []
    batch = draw(backbone, SEEDS, PROMPTS, NEGATIVES, guided * len(SEEDS)).latents
    for i in range(len(SEEDS)):
        alone = draw(backbone, SEEDS[i : i + 1], PROMPTS[i : i + 1], NEGATIVES[i : i + 1], guided).latents
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=5e-6)


@every_family
def test_two_runs_are_bit_identical(name: str) -> None:
    case = CASES[name]
    first, second = (draw(backbone, SEEDS, PROMPTS).latents for backbone in (shared(name), case.make()))
    assert torch.equal(first, second)
    assert torch.equal(shared(name).decode(first), case.make().decode(second))


@every_family
def test_the_prompt_matters_and_each_text_is_encoded_once(name: str) -> None:
    case = CASES[name]
    backbone, calls = case.make(), []
    backbone.text_encoders()[0].register_forward_hook(lambda *_: calls.append(1))
    first = draw(backbone, [1, 1], PROMPTS[:2]).latents
    assert (first[0] - first[1]).abs().max() > 1e-4
    assert len(calls) == 2
    again = backbone.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert len(calls) == 2
    alone = case.make().encode([PROMPTS[1]])
    for text in (again.take([0]), again.take([2])):
        for tensor, expected in zip(text.tensors.values(), alone.tensors.values(), strict=True):
            assert torch.equal(tensor, expected)


@every_family
def test_the_schedule_is_that_of_the_stock_call(name: str) -> None:
    case, pipe = CASES[name], CASES[name].pipe()
    arguments = {"height": case.size[0], "width": case.size[1], "output_type": "latent", **case.unguided}
    for num_steps in (1, 4):
        pipe(prompt=PROMPTS[0], num_inference_steps=num_steps, **arguments)
        assert torch.equal(shared(name).schedule(num_steps), pipe.scheduler.sigmas)
    with pytest.raises(UserError, match="num_steps is 0"):
        shared(name).schedule(0)


@every_family
def test_a_saved_folder_gives_the_same_velocities_and_bfloat16_close_ones(name: str, tmp_path: Path) -> None:
    case, backbone = CASES[name], shared(name)
    backbone.pipeline.save_pretrained(tmp_path / "model")
    sigma = torch.tensor([0.7])
    expected = backbone.velocity(backbone.noise([1]), sigma, backbone.encode(PROMPTS[:1]))
    for dtype in ("float32", "bfloat16"):
        loaded = case.backbone(str(tmp_path / "model"), dtype, None, *case.size)
        assert loaded.name == str(tmp_path / "model")
        assert loaded.dtype == getattr(torch, dtype)
        assert not any(parameter.requires_grad for parameter in loaded.modules().parameters())
        velocity = loaded.velocity(loaded.noise([1]), sigma, loaded.encode(PROMPTS[:1]))
        assert velocity.dtype == torch.float32
        if dtype == "float32":
            assert torch.equal(velocity, expected)
        else:
            assert 0 < (velocity - expected).abs().max() < 0.2 * expected.abs().max()


@every_family
def test_sizes_that_the_model_cannot_make_are_refused_with_the_nearest_allowed(name: str) -> None:
    case, pipe = CASES[name], CASES[name].pipe()
    good, side = {"height": case.size[0], "width": case.size[1]}, case.multiple
    for which in ("height", "width"):
        with pytest.raises(UserError, match=rf"{which} is {5 * side + 1}; .*multiples of {side}.*to {5 * side}\."):
            case.backbone.of(pipe, **good | {which: 5 * side + 1})
        with pytest.raises(UserError, match=rf"{which} is 0; .*Set {which} to {side}\."):
            case.backbone.of(pipe, **good | {which: 0})
        if case.largest is not None:
            with pytest.raises(UserError, match=rf"{which} is {case.largest + side}; .* to {case.largest} pixels"):
                case.backbone.of(pipe, **good | {which: case.largest + side})


@every_family
def test_other_schedulers_are_refused(name: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    case, pipe = CASES[name], CASES[name].pipe()
    for scheduler in (
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(UserError, match=f"{case.backbone.__name__} is sampled with a deterministic FlowMatchEuler"):
            case.backbone.of(pipe, *case.size)


@every_family
def test_decode_in_parts_equals_decode_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = shared(name)
    latents = backbone.noise([1, 2, 3])
    whole = backbone.decode(latents)
    assert whole.shape == (3, 3, *CASES[name].size)
    assert 0 <= whole.min() < whole.max() <= 1
    pixels = CASES[name].size[0] * CASES[name].size[1]
    monkeypatch.setattr("calibri_lightning.backbones.native.PIXELS_PER_DECODE", 2 * pixels)
    torch.testing.assert_close(backbone.decode(latents), whole, rtol=0, atol=1e-6)


def test_another_familys_folder_names_the_backbone_to_use(tmp_path: Path) -> None:
    CASES["flux1-dev"].pipe().save_pretrained(tmp_path / "flux")
    with pytest.raises(UserError, match="holds a FluxPipeline; this backbone needs a ZImagePipeline. Use FLUX1,"):
        ZImage(str(tmp_path / "flux"))
    with pytest.raises(UserError, match="needs a Flux2Pipeline or Flux2KleinPipeline. Use FLUX1,"):
        FLUX2(str(tmp_path / "flux"))
    tiny.fresh(tiny.wan).save_pretrained(tmp_path / "wan")
    with pytest.raises(UserError, match="holds a WanPipeline; .* Use Stock,"):
        SD3(str(tmp_path / "wan"))
    with pytest.raises(UserError, match="holds a StableDiffusion3Pipeline; .* Use SD3,"):
        FLUX1("shapes")
