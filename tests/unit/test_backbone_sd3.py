"""The native SD3 sampler is the stock pipeline, and a model that cannot be loaded says why."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.calibration.attach import attach
from calibri_lightning.calibration.scales import Layout, build_layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.rollout import sample
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

PROMPTS = ["a red circle", "two green squares", "a blue triangle above a red square", "qqq!"]
NEGATIVES = ["", "a red circle", "blurry", ""]


_PRISTINE: list[StableDiffusion3Pipeline] = []


def stock_pipeline() -> StableDiffusion3Pipeline:
    """A fresh, untouched copy of one tiny pipeline."""
    if not _PRISTINE:
        _PRISTINE.append(build_pipeline(TINY))
    return copy.deepcopy(_PRISTINE[0])


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3.of(stock_pipeline())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    stock_pipeline().save_pretrained(path)
    return path


def native_latents(
    backbone: SD3, layout: Layout, noise: Tensor, num_steps: int, prompts: list[str], negatives: list[str]
) -> Tensor:
    attachment = attach(backbone.transformer, layout.sites)
    try:
        rows = layout.rows(torch.from_numpy(layout.start.copy())[None].expand(len(noise), -1))
        positive, negative = backbone.encode(prompts), backbone.encode(negatives)
        return sample(backbone, attachment, rows, layout.members, positive, negative, noise, num_steps).latents
    finally:
        attachment.detach()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5, 7.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_latents_equal_those_of_the_stock_call(backbone: SD3, guidance_scale: float, num_steps: int) -> None:
    noise = backbone.noise([3, 1, 4, 1])
    arguments = {
        "prompt": PROMPTS,
        "negative_prompt": NEGATIVES,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_steps,
        "output_type": "latent",
    }
    pipe = stock_pipeline()
    stock = pipe(latents=noise, **arguments).images
    layout = build_layout(find_sites(backbone.transformer), "gate", "cfg", guidance_scale)
    native = native_latents(backbone, layout, noise, num_steps, PROMPTS, NEGATIVES)
    assert (stock - noise).abs().max() > 0.1
    # Guidance g multiplies the rounding of both forwards by up to 2g - 1.
    torch.testing.assert_close(native, stock, rtol=0, atol=2e-6 * max(1, guidance_scale))
    for network in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        network.double()
    exact = pipe(latents=noise.double(), **arguments).images
    assert (native - exact).abs().max() < 2 * (stock - exact).abs().max() + 1e-6


def test_pictures_equal_those_of_the_stock_call_with_generators(backbone: SD3) -> None:
    seeds = [11, 2**62 + 5]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipe = stock_pipeline()
    stock = pipe(
        prompt=PROMPTS[:2], generator=generators, guidance_scale=3.0, num_inference_steps=3, output_type="pt"
    ).images
    layout = build_layout(find_sites(backbone.transformer), "block", "cfg", 3.0)
    latents = native_latents(backbone, layout, backbone.noise(seeds), 3, PROMPTS[:2], ["", ""])
    torch.testing.assert_close(backbone.decode(latents), stock, rtol=0, atol=3e-6)
    assert backbone.decode(latents).min() >= 0
    assert backbone.decode(latents).max() <= 1


@pytest.mark.parametrize("change", [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.13}])
def test_schedule_is_the_schedulers_own(change: dict[str, float]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = stock_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **change)
    backbone = SD3.of(pipe)
    native = backbone.schedule(5)
    seen: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"].clone()), with_kwargs=True
    )
    pipe("a red circle", num_inference_steps=5, guidance_scale=1.0, output_type="latent")
    assert torch.equal(native, pipe.scheduler.sigmas)
    x, conditioning = backbone.noise([0]), backbone.encode(["a red circle"])
    stock_times, seen[:] = torch.cat(seen), []
    for sigma in native[:-1]:
        backbone.velocity(x, sigma.expand(1), conditioning)
    # Bit for bit, and not whole numbers: a truncated timestep would be another model input.
    assert torch.equal(torch.cat(seen), stock_times)
    assert (stock_times != stock_times.floor()).any()


def test_zero_t5_tokens_collapse_without_changing_the_stock_pipeline(backbone: SD3) -> None:
    stock, wrapped = stock_pipeline(), backbone.pipeline
    arguments = {
        "prompt": PROMPTS[0],
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }
    noise = backbone.noise([9])
    assert torch.equal(stock(**arguments, latents=noise).images, wrapped(**arguments, latents=noise).images)
    assert backbone.encode([PROMPTS[0]]).tensors["prompt"].shape[1] == TINY.max_tokens + 1


def test_cached_embeddings_equal_fresh_ones_and_each_text_is_encoded_once() -> None:
    backbone = SD3.of(stock_pipeline())
    calls = []
    backbone.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = backbone.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert len(calls) == 2
    again = backbone.encode([PROMPTS[1], PROMPTS[0]])
    assert len(calls) == 2
    fresh = SD3.of(stock_pipeline()).encode([PROMPTS[0]])
    for name in ("prompt", "pooled"):
        assert torch.equal(first.tensors[name][0], first.tensors[name][2])
        assert torch.equal(first.tensors[name][1], again.tensors[name][0])
        assert torch.equal(fresh.tensors[name][0], again.tensors[name][1])
        assert not torch.equal(first.tensors[name][0], first.tensors[name][1])


def test_encoders_in_train_mode_are_put_into_evaluation_mode() -> None:
    pipe = stock_pipeline()
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        for layer in encoder.modules():
            if hasattr(layer, "dropout") and isinstance(layer.dropout, float):
                layer.dropout = 0.5
        encoder.train()
    backbone = SD3.of(pipe)
    assert not any(module.training for part in backbone.modules() for module in part.modules())
    assert not any(parameter.requires_grad for parameter in backbone.modules().parameters())
    expected = SD3.of(stock_pipeline()).encode(PROMPTS[:1])
    assert torch.equal(backbone.encode(PROMPTS[:1]).tensors["prompt"], expected.tensors["prompt"])


def test_noise_of_a_row_depends_on_its_seed_alone(backbone: SD3) -> None:
    torch.manual_seed(0)
    batch = backbone.noise([5, 6, 7])
    state = torch.get_rng_state()
    assert torch.equal(backbone.noise([7, 5])[0], batch[2])
    assert torch.equal(torch.cat([backbone.noise([6])]), batch[1:2])
    assert torch.equal(torch.get_rng_state(), state)


def test_guide_is_classifier_free_guidance(backbone: SD3) -> None:
    conditional, unconditional = torch.randn(2, 5, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[4.5, -3.5]]).expand(5, 2)
    guided = backbone.guide(torch.stack([conditional, unconditional], dim=1), weights)
    torch.testing.assert_close(guided, unconditional + 4.5 * (conditional - unconditional), rtol=1e-5, atol=1e-5)


def test_decode_in_parts_equals_decode_at_once(backbone: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = backbone.noise([1, 2, 3])
    whole = backbone.decode(latents)
    monkeypatch.setattr("calibri_lightning.backbones.native.PIXELS_PER_DECODE", 16 * 16 * 2)
    torch.testing.assert_close(backbone.decode(latents), whole, rtol=0, atol=1e-6)


def test_bfloat16_keeps_latents_in_float32(folder: Path) -> None:
    backbone = SD3(str(folder), dtype="bfloat16")
    assert {p.dtype for p in backbone.modules().parameters()} == {torch.bfloat16}
    velocity = backbone.velocity(backbone.noise([0]), torch.ones(1), backbone.encode(["a red circle"]))
    exact = SD3(str(folder))
    expected = exact.velocity(exact.noise([0]), torch.ones(1), exact.encode(["a red circle"]))
    assert velocity.dtype == torch.float32
    assert (velocity - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_saved_folder_gives_the_same_latents(folder: Path, backbone: SD3) -> None:
    loaded = SD3(str(folder))
    x = loaded.noise([1])
    arguments = x, torch.full((1,), 0.7), loaded.encode([PROMPTS[0]])
    assert torch.equal(loaded.velocity(*arguments), backbone.velocity(*arguments))


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("component", ["vae", "text_encoder_2", "tokenizer", "scheduler", "transformer"])
def test_a_missing_component_is_named(folder: Path, tmp_path: Path, component: str) -> None:
    broken = copy_of(folder, tmp_path)
    shutil.rmtree(broken / component)
    with pytest.raises(UserError, match=f"lacks its component '{component}'"):
        SD3(str(broken))


def test_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    for file in (broken / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="component 'vae'.*has no weights"):
        SD3(str(broken))


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
def test_corrupted_weights_are_named(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = copy_of(folder, tmp_path)
    file = next((broken / "transformer").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes({"truncate": content[:-100], "garbage": b"\xff" * 2000, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"component 'transformer' are damaged: .*safetensors"):
        SD3(str(broken))


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_weights_that_lack_a_tensor_are_refused(folder: Path, tmp_path: Path, component: str) -> None:
    """Libraries initialise absent tensors at random; that model would not be the user's."""
    from safetensors.torch import load_file, save_file

    broken = copy_of(folder, tmp_path)
    file = next((broken / component).glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=component):
        SD3(str(broken))


def test_unusable_model_indices_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    index = broken / "model_index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({**entries, "_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="FluxPipeline.*StableDiffusion3Pipeline"):
        SD3(str(broken))
    index.write_text("{")
    with pytest.raises(UserError, match="not a diffusers model index"):
        SD3(str(broken))
    index.unlink()
    with pytest.raises(UserError, match=r"no model_index\.json"):
        SD3(str(broken))


def test_unusable_names_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="neither an existing folder nor a Hub id"):
        SD3(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="'float32' or 'bfloat16'"):
        SD3(str(folder), dtype="float16")  # type: ignore[arg-type]
    monkeypatch.setattr("calibri_lightning.backbones.loading.SHAPES_FOLDER", tmp_path / "absent")
    with pytest.raises(UserError, match=r"shapes\.train"):
        SD3()


def test_an_unreachable_hub_model_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("We couldn't connect\nsecond line")

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", offline)
    with pytest.raises(UserError, match="could not be fetched from the Hub .*couldn't connect") as caught:
        SD3("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("height", "width", "named"), [(12, 16, "height"), (16, 24, "width"), (0, 8, "height")])
def test_sizes_that_the_model_cannot_make_are_refused(height: int, width: int, named: str) -> None:
    with pytest.raises(UserError, match=f"{named} is .*multiples of 8, from 8 to 16 pixels"):
        SD3.of(stock_pipeline(), height=height, width=width)


def test_a_smaller_size_equals_the_stock_call() -> None:
    backbone, pipe = SD3.of(stock_pipeline(), height=8, width=16), stock_pipeline()
    noise = backbone.noise([4])
    assert noise.shape[2:] == (2, 4)
    stock = pipe(
        prompt="a red circle",
        height=8,
        width=16,
        latents=noise,
        guidance_scale=1.0,
        num_inference_steps=2,
        output_type="latent",
    ).images
    layout = build_layout(find_sites(backbone.transformer), "gate", "single")
    native = native_latents(backbone, layout, noise, 2, ["a red circle"], [""])
    torch.testing.assert_close(native, stock, rtol=0, atol=2e-6)
    assert backbone.decode(native).shape == (1, 3, 8, 16)


def test_a_foreign_scheduler_and_too_few_steps_are_refused(backbone: SD3) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = stock_pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(UserError, match="FlowMatchHeunDiscreteScheduler"):
        SD3.of(pipe)
    with pytest.raises(UserError, match="num_steps is 0"):
        backbone.schedule(0)


def test_a_silent_t5_encoder_is_collapsed_and_equals_the_stock_call() -> None:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pipe = stock_pipeline()
    width = pipe.transformer.config.joint_attention_dim
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "▁")]
    pipe.tokenizer_3 = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=256)
    config = T5Config(vocab_size=4, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    pipe.text_encoder_3 = T5EncoderModel(config).eval()
    audible = SD3.of(copy.deepcopy(pipe)).encode(["a red circle"]).tensors["prompt"]
    assert audible.shape[1] == TINY.max_tokens + 256
    torch.nn.init.zeros_(pipe.text_encoder_3.encoder.final_layer_norm.weight)
    backbone = SD3.of(copy.deepcopy(pipe))
    assert backbone.encode(["a red circle"]).tensors["prompt"].shape[1] == TINY.max_tokens + 1
    noise = backbone.noise([1])
    stock = pipe("a red circle", latents=noise, guidance_scale=1.0, num_inference_steps=2, output_type="latent").images
    layout = build_layout(find_sites(backbone.transformer), "gate", "single")
    native = native_latents(backbone, layout, noise, 2, ["a red circle"], [""])
    torch.testing.assert_close(native, stock, rtol=0, atol=2e-6)
