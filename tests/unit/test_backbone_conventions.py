"""What only some families have: embedded guidance, other guidance formulas, padding, rescaling, system prompts."""

from __future__ import annotations

import pytest
import tiny_pipelines as tiny
import torch
from sampling_tools import NoHooks, draw

from calibri_lightning.assembly import CalibrationConfig, assemble
from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Conditioning, Krea2, Lumina2, QwenImage, ZImage
from calibri_lightning.backbones.packing import pack, unpack
from calibri_lightning.calibration.scales import Member, Rows
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.guidance import rescaled
from calibri_lightning.sampling.rollout import sample
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

PROMPT = "a red circle"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- conditionings of different length


def text(length: int, seed: int = 0) -> Conditioning:
    return Conditioning.of_text(normal(1, length, 4, seed=seed))


def test_joining_pads_with_zeros_that_the_mask_marks() -> None:
    joined = Conditioning.cat([text(2), text(5, seed=1), text(3, seed=2)])
    assert len(joined) == 3
    assert joined.lengths == (2, 5, 3)
    assert joined.mask is not None
    assert joined.mask.sum(dim=1).tolist() == [2, 5, 3]
    assert joined.mask.dtype == torch.bool
    for row, (length, seed) in enumerate(((2, 0), (5, 1), (3, 2))):
        assert torch.equal(joined.tensors["prompt"][row, :length], normal(1, length, 4, seed=seed)[0])
        assert not joined.tensors["prompt"][row, length:].any()
        assert joined.mask[row].tolist() == [True] * length + [False] * (5 - length)


def test_taking_rows_cuts_off_padding_that_none_of_them_needs() -> None:
    joined = Conditioning.cat([text(2), text(5, seed=1), text(3, seed=2)])
    for rows in ([2, 0, 2], torch.tensor([2, 0, 2])):
        taken = joined.take(rows)
        assert taken.lengths == (3, 2, 3)
        assert taken.tensors["prompt"].shape == (3, 3, 4)
        assert torch.equal(taken.tensors["prompt"][1], joined.tensors["prompt"][0, :3])
    one = joined.take([0, 0])
    assert one.mask is None
    assert one.tensors["prompt"].shape == (2, 2, 4)
    assert Conditioning.cat([taken, one]).lengths == (3, 2, 3, 2, 2)
    assert joined.to("cpu").lengths == joined.lengths


def test_other_tensors_beside_a_text_are_joined_as_they_are() -> None:
    parts = [
        Conditioning({**text(n).tensors, "pooled": normal(1, 5, seed=n), "layers": normal(1, 7, n)}, (n,))
        for n in (2, 2)
    ]
    joined = Conditioning.cat(parts)
    assert joined.tensors["pooled"].shape == (2, 5)
    assert joined.mask is None
    assert joined.take([1]).tensors["layers"].shape == (1, 7, 2)


# ---- packing and rescaling


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_packing_is_that_of_the_stock_pipelines_and_can_be_undone(leading: tuple[int, ...]) -> None:
    from diffusers import FluxPipeline

    latents = normal(*leading, 5, 4, 6)
    packed = pack(latents)
    assert packed.shape == (*leading, 6, 20)
    assert torch.equal(unpack(packed, 4, 6), latents)
    flat, tokens = latents.reshape(-1, 5, 4, 6), packed.reshape(-1, 6, 20)
    assert torch.equal(tokens, FluxPipeline._pack_latents(flat, len(flat), 5, 4, 6))
    assert torch.equal(flat, FluxPipeline._unpack_latents(tokens, 8, 12, 2))


def test_rescaling_keeps_the_length_of_the_prompts_velocity_and_the_direction_of_guidance() -> None:
    conditional, unconditional = normal(2, 6, 5, 8)
    velocities = torch.stack([conditional, unconditional], dim=1)
    guided = rescaled(velocities, torch.tensor([[4.0, -3.0]]).expand(6, 2))
    plain = unconditional + 4.0 * (conditional - unconditional)
    torch.testing.assert_close(guided.norm(dim=-1), conditional.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(guided, plain, dim=-1), torch.ones(6, 5))
    # Scaling the outputs of both passes by s, as strength does, scales the stock pipelines' velocity by |s|.
    twice = rescaled(velocities, 2 * torch.tensor([[4.0, -3.0]]).expand(6, 2))
    torch.testing.assert_close(twice, 2 * guided)
    torch.testing.assert_close(rescaled(2 * velocities, torch.tensor([[4.0, -3.0]]).expand(6, 2)), 2 * guided)


def test_rescaling_leaves_a_single_member_and_a_vanishing_velocity_alone() -> None:
    velocity = normal(3, 1, 4, 8)
    velocity[0, 0, 0] = 0.0
    alone = rescaled(velocity, torch.ones(3, 1))
    torch.testing.assert_close(alone, velocity[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(rescaled(velocity, -torch.ones(3, 1)), -velocity[:, 0], rtol=1e-6, atol=0)
    assert not alone[0, 0].any()


def test_the_first_member_sets_the_length_even_where_it_has_no_weight() -> None:
    """Otherwise a picture would change with the weights of its neighbours."""
    backbone = QwenImage.of(tiny.fresh(tiny.qwen_image), 8, 8)
    prompts, negatives = [PROMPT, "q"], ["", "blurry"]
    beside = draw(backbone, [1, 2], prompts, negatives, [[0.0, 1.0], [3.0, -2.0]]).latents[:1]
    alone = draw(backbone, [1], prompts[:1], negatives[:1], [[0.0, 1.0]]).latents
    torch.testing.assert_close(alone, beside, rtol=0, atol=5e-6)
    unconditional = draw(backbone, [1], negatives[:1]).latents
    assert (alone - unconditional).abs().max() > 1e-4


# ---- guidance


def test_guidance_scales_mean_what_they_mean_to_the_stock_pipelines() -> None:
    tiny_sd3 = SD3.of(build_pipeline(TINY))
    assert tiny_sd3.plain_guidance(4.5) == 4.5
    for family, build in ((ZImage, tiny.z_image), (Krea2, tiny.krea2)):
        backbone = family.of(tiny.fresh(build), 8, 8)
        plain = backbone.plain_guidance(3.0)
        conditional, unconditional = normal(2, 1, 4, 4, 4)
        guided = backbone.guide(torch.stack([conditional, unconditional], dim=1), torch.tensor([[plain, 1 - plain]]))
        torch.testing.assert_close(guided, conditional + 3.0 * (conditional - unconditional))
        assert backbone.plain_guidance(0.0) == 1.0


def test_the_configured_guidance_becomes_the_models_own_weights() -> None:
    class ShiftedGuidance(SD3):
        def plain_guidance(self, guidance_scale: float) -> float:
            return 1.0 + guidance_scale

    layout, attachment = assemble(ShiftedGuidance.of(build_pipeline(TINY)), CalibrationConfig("block", "cfg", 3.0))
    attachment.detach()
    assert [member.weight for member in layout.members] == [4.0, -3.0]


@pytest.mark.parametrize(
    ("family", "build", "stock_guidance"), [(FLUX1, tiny.flux1, 3.5), (FLUX2, tiny.flux2_dev, 4.0)]
)
def test_embedded_guidance_is_the_stock_calls_guidance_scale(family, build, stock_guidance: float) -> None:
    backbone = family.of(tiny.fresh(build), 8, 8)
    assert backbone.embedded_guidance == stock_guidance
    default = draw(backbone, [1], [PROMPT]).latents
    backbone.embedded_guidance = 1.5
    native = draw(backbone, [1], [PROMPT]).latents
    assert (native - default).abs().max() > 1e-4
    pictures = tiny.fresh(build)(
        prompt=PROMPT,
        height=8,
        width=8,
        num_inference_steps=3,
        guidance_scale=1.5,
        generator=[torch.Generator().manual_seed(1)],
        output_type="pt",
    ).images
    torch.testing.assert_close(backbone.decode(native), pictures, rtol=0, atol=3e-6)


def test_embedded_guidance_is_an_argument_of_distilled_models_alone(tmp_path) -> None:
    tiny.fresh(tiny.flux1).save_pretrained(tmp_path / "dev")
    tiny.fresh(tiny.flux1, guidance_embeds=False).save_pretrained(tmp_path / "schnell")
    sizes = {"dtype": "float32", "height": 8, "width": 8}
    assert FLUX1(str(tmp_path / "dev"), embedded_guidance=2.0, **sizes).embedded_guidance == 2.0
    assert not FLUX1(str(tmp_path / "schnell"), **sizes).takes_guidance
    with pytest.raises(UserError, match="embedded_guidance is 2, but .*schnell is not guidance-distilled"):
        FLUX1(str(tmp_path / "schnell"), embedded_guidance=2.0, **sizes)


@pytest.mark.parametrize(
    ("build", "options", "refused"),
    [
        (tiny.flux2_dev, {}, True),
        (tiny.flux2_klein, {"distilled": True}, True),
        (tiny.flux2_klein, {"distilled": False}, False),
    ],
)
def test_flux2_takes_a_negative_prompt_only_where_the_stock_pipeline_does(build, options, refused: bool) -> None:
    backbone = FLUX2.of(tiny.fresh(build, **options), 8, 8)
    for members in ("single", 3):
        backbone.check_members(members, "raw")
    if refused:
        with pytest.raises(UserError, match="members is cfg, but this FLUX.2 model was distilled"):
            assemble(backbone, CalibrationConfig(members="cfg"))
    else:
        backbone.check_members("cfg", "raw")


# ---- texts


def test_lumina_puts_its_system_prompt_before_prompts_and_not_before_negative_prompts() -> None:
    backbone = Lumina2.of(tiny.fresh(tiny.lumina2), 32, 32)
    prompt, negative = backbone.encode([PROMPT]), backbone.encode([PROMPT], negative=True)
    assert prompt.lengths is not None
    assert negative.lengths is not None
    assert prompt.lengths[0] > negative.lengths[0] + 100
    stock = backbone.pipeline.encode_prompt([PROMPT], negative_prompt=[PROMPT])
    for own, embeddings, mask in ((prompt, stock[0], stock[1]), (negative, stock[2], stock[3])):
        torch.testing.assert_close(own.tensors["prompt"], embeddings[:, mask[0].bool()], rtol=0, atol=1e-6)


def test_krea_drops_the_padding_that_the_stock_pipeline_masks() -> None:
    backbone = Krea2.of(tiny.fresh(tiny.krea2), 8, 8)
    encoded = backbone.encode([PROMPT])
    embeddings, mask = backbone.pipeline.encode_prompt([PROMPT])
    assert not mask.all()
    assert encoded.lengths == (int(mask.sum()),)
    assert torch.equal(encoded.tensors["prompt"], embeddings[:, mask[0]])


def test_no_step_waits_for_the_device_to_learn_the_lengths_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = QwenImage.of(tiny.fresh(tiny.qwen_image), 8, 8)
    prompts, noise = backbone.encode([PROMPT, "q"]), backbone.noise([1, 2])
    attachment = NoHooks()
    rows, members = Rows(torch.ones(2, 1, 0), torch.ones(2, 1)), [Member("prompt", 1.0)]
    asked: list[str] = []
    velocity, transformer = backbone.velocity, backbone.transformer.forward

    def watched(*arguments: object) -> torch.Tensor:
        for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero"):
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda self, *a, n=name, o=original: asked.append(n) or o(self, *a))
        try:
            return velocity(*arguments)
        finally:
            monkeypatch.undo()

    # What the stock transformer asks inside is its own affair.
    output = transformer(
        hidden_states=pack(noise),
        timestep=torch.ones(2),
        encoder_hidden_states=prompts.tensors["prompt"],
        encoder_hidden_states_mask=prompts.mask,
        img_shapes=[[(1, 2, 2)]] * 2,
        return_dict=False,
    )
    backbone.transformer.forward = lambda **_: output
    backbone.velocity = watched  # type: ignore[method-assign]
    sample(backbone, attachment, rows, members, prompts, None, noise, 2)  # type: ignore[arg-type]
    assert asked == []


# ---- configurations


def test_every_backbone_can_be_configured_by_its_short_name() -> None:
    from jsonargparse import ArgumentParser

    import calibri_lightning
    from calibri_lightning.backbones import Backbone
    from calibri_lightning.naming import SHORT_NAMES

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    families = [name for name in SHORT_NAMES if issubclass(name, Backbone)]
    assert len(families) == 8
    for family in families:
        assert getattr(calibri_lightning, family.__name__) is family
        config = parser.parse_args(
            [f"--backbone={family.__name__}", "--backbone.pretrained=a/b", "--backbone.height=64"]
        )
        assert config.backbone.class_path.endswith(f".{family.__name__}")
        dtype = "float32" if family is SD3 else "bfloat16"
        assert (config.backbone.init_args.height, config.backbone.init_args.dtype) == (64, dtype)
    stock = parser.parse_args(
        ["--backbone=Stock", "--backbone.pretrained=a/b", '--backbone.arguments={"a": 3, "b": true}']
    )
    given = stock.backbone.init_args.arguments
    assert (given, type(given["a"]), type(given["b"])) == ({"a": 3, "b": True}, int, bool)
    with pytest.raises(Exception, match="embedded_guidance"):
        parser.parse_args(["--backbone=ZImage", "--backbone.pretrained=a/b", "--backbone.embedded_guidance=3"])
