"""Every native backbone is the stock pipeline, whatever the batch around a picture (SD3 has a file of its own)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from sampling_tools import draw
from tiny_families import CASES, NEGATIVES, PROMPTS, SEEDS

from calibri_lightning.backbones import FLUX1, FLUX2, SD3, ZImage
from calibri_lightning.backbones.native import Native
from calibri_lightning.errors import UserError

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
