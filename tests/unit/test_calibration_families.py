"""A calibration on every family's stock pipeline gives what the native backbone gives (SD3 has a file of its own)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_families import CASES, NEGATIVES, PROMPTS, SEEDS
from tiny_runs import TinyRuns
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from calibri_lightning.assembly import CalibrationConfig, assemble
from calibri_lightning.backbones import Stock
from calibri_lightning.calibration import (
    CalibrationFile,
    Layout,
    Member,
    attach,
    build_layout,
    find_sites,
    fingerprint,
    fuse,
    load_calibration,
    unload_calibration,
    write_calibration,
)
from calibri_lightning.calibration.conventions import CONVENTIONS, convention_of
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.noise import noise_seed

GUIDED = [name for name, case in CASES.items() if case.guidance]
every_family = pytest.mark.parametrize("name", CASES)
every_guided = pytest.mark.parametrize("name", GUIDED)


def layout_of(name: str, members: Any, mode: Any = "raw") -> Layout:
    return build_layout(find_sites(CASES[name].pipe().transformer), "gate", members, 3.0, mode)


def perturbed(layout: Layout) -> np.ndarray:
    return layout.start + 0.2 * np.random.default_rng(5).standard_normal(layout.num_parameters)


def save(pipe: DiffusionPipeline, layout: Layout, theta: np.ndarray, folder: Path) -> Path:
    path = folder / "calibration.json"
    values, model = tuple(theta.tolist()), fingerprint(pipe.transformer, "tiny")
    write_calibration(
        path, CalibrationFile(layout.names, values, layout.granularity, layout.members, layout.weight_mode, model)
    )
    return path


def loaded(name: str, layout: Layout, theta: np.ndarray, folder: Path) -> DiffusionPipeline:
    pipe = CASES[name].pipe()
    return load_calibration(pipe, save(pipe, layout, theta, folder))


def native(name: str, layout: Layout, theta: np.ndarray) -> Tensor:
    """Latents of the backbone, as the stock call returns them."""
    case = CASES[name]
    backbone = case.make()
    attachment = attach(backbone.transformer, layout.sites)
    count = len(PROMPTS)
    samples = backbone.sample(
        attachment,
        layout.rows(torch.from_numpy(theta)[None].expand(count, -1)),
        layout.members,
        backbone.encode(PROMPTS),
        backbone.encode(NEGATIVES if case.takes_negative else [""] * count, negative=True),
        backbone.noise(SEEDS),
        3,
    )
    return case.latents(backbone, samples.latents)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@every_guided
@pytest.mark.parametrize("mode", ["raw", "guidance"])
def test_a_guided_calibration_is_the_native_one_at_any_guidance_scale(name: str, mode: str, tmp_path: Path) -> None:
    case, layout = CASES[name], layout_of(name, "cfg", mode)
    theta = perturbed(layout)
    expected = native(name, layout, theta)
    pipe = loaded(name, layout, theta, tmp_path)
    for guidance in (1.5, 4.0):
        close(case.call(pipe, guidance=guidance), expected)
    assert (case.stock("latent", guidance=2.0) - expected).abs().max() > 1e-2


@every_family
@pytest.mark.parametrize("members", ["single", 3])
def test_members_that_see_the_prompt_are_the_native_ones(name: str, members: Any, tmp_path: Path) -> None:
    case, layout = CASES[name], layout_of(name, members)
    theta = perturbed(layout)
    expected = native(name, layout, theta)
    close(case.call(loaded(name, layout, theta, tmp_path)), expected)
    assert (case.stock("latent") - expected).abs().max() > 1e-3


@every_guided
def test_a_single_calibration_scales_both_prompts_of_a_guided_call(name: str, tmp_path: Path) -> None:
    """As the pair whose members have the same scales, and the call's plain guidance as weights."""
    case, layout = CASES[name], layout_of(name, "single")
    theta = perturbed(layout)
    scales, weight = theta[:-1], theta[-1]
    plain = case.make().plain_guidance(2.5)
    pair = layout_of(name, "cfg")
    expected = native(name, pair, np.concatenate([scales, scales, [weight * plain, weight * (1 - plain)]]))
    close(case.call(loaded(name, layout, theta, tmp_path), guidance=2.5), expected)


@every_guided
@pytest.mark.parametrize("mode", ["raw", "guidance", "fixed"])
def test_untouched_values_at_the_calibrations_guidance_change_nothing(name: str, mode: Any, tmp_path: Path) -> None:
    """Bit by bit where the pipeline says its guidance scale."""
    case, backbone = CASES[name], CASES[name].make()
    members = (Member("prompt", backbone.plain_guidance(2.3)), Member("negative", 1.0 - backbone.plain_guidance(2.3)))
    layout = Layout(find_sites(backbone.transformer), "gate", members, mode)
    found = case.call(loaded(name, layout, layout.start, tmp_path), guidance=2.3)
    expected = case.stock("latent", guidance=2.3)
    if CONVENTIONS[type(backbone.pipeline).__name__].says_guidance:
        assert torch.equal(found, expected)
    else:
        close(found, expected)


@every_family
def test_unloading_gives_the_stock_pipeline_back(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    guidance = 2.5 if case.guidance else None
    layout = layout_of(name, "cfg" if guidance else 2)
    pipe = loaded(name, layout, perturbed(layout), tmp_path)
    plain = case.stock("latent", guidance)
    assert not torch.equal(case.call(pipe, guidance=guidance), plain)
    assert torch.equal(case.call(unload_calibration(pipe), guidance=guidance), plain)


@every_family
def test_fused_equals_hooked_with_a_learned_weight(name: str, tmp_path: Path) -> None:
    case, layout = CASES[name], layout_of(name, "single")
    theta = perturbed(layout)
    assert theta[-1] != 1.0
    pipe = loaded(name, layout, theta, tmp_path)
    hooked = case.call(pipe)
    fused = case.call(fuse(pipe))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    torch.testing.assert_close(fused, hooked, rtol=0, atol=2e-5)


@every_guided
def test_the_batch_may_change_between_calls(name: str, tmp_path: Path) -> None:
    case, layout = CASES[name], layout_of(name, "cfg")
    pipe = loaded(name, layout, perturbed(layout), tmp_path)
    three = case.call(pipe, guidance=2.0)
    close(case.call(pipe, guidance=2.0, rows=slice(1, 2)), three[1:2])
    assert torch.equal(case.call(pipe, guidance=2.0), three)


@pytest.mark.parametrize("name", [name for name in GUIDED if name != "z-image"])  # which runs both prompts at once
@pytest.mark.parametrize("broken_at", [1, 2, 4])
def test_a_call_that_was_broken_off_leaves_no_trace(name: str, broken_at: int, tmp_path: Path) -> None:
    case, layout = CASES[name], layout_of(name, "cfg")
    pipe = loaded(name, layout, perturbed(layout), tmp_path)
    expected = case.call(pipe, guidance=2.0)
    forwards: list[int] = []

    def interrupt(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == broken_at:
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.call(pipe, guidance=2.0)
    handle.remove()
    assert torch.equal(case.call(pipe, guidance=2.0), expected)


@every_guided
def test_a_call_without_guidance_is_refused(name: str, tmp_path: Path) -> None:
    case, layout = CASES[name], layout_of(name, "cfg")
    pipe = loaded(name, layout, layout.start, tmp_path)
    with pytest.raises(UserError, match=rf"switches guidance off.*{case.guidance} above"):
        case.call(pipe)
    close(case.call(pipe, guidance=2.0), native(name, layout, layout.start))


@pytest.mark.parametrize("name", ["flux1-dev", "qwen-image"])
def test_one_step_does_not_show_whether_a_call_is_guided(name: str, tmp_path: Path) -> None:
    case, layout = CASES[name], layout_of(name, "cfg")
    pipe = loaded(name, layout, layout.start, tmp_path)
    for guidance in (None, 2.0):
        with pytest.raises(UserError, match="one step.*num_inference_steps of 2 or more"):
            case.call(pipe, guidance=guidance, num_steps=1)


def test_z_image_is_guided_in_all_steps_or_refused(tmp_path: Path) -> None:
    layout = layout_of("z-image", "cfg")
    pipe = loaded("z-image", layout, layout.start, tmp_path)
    with pytest.raises(UserError, match="cfg_truncation 0.5, which switches guidance off in its last steps"):
        pipe(PROMPTS[0], height=8, width=8, num_inference_steps=3, guidance_scale=2.0, cfg_truncation=0.5)


@pytest.mark.parametrize(
    ("build", "options", "name"),
    [(tiny.flux2_dev, {}, "Flux2Pipeline"), (tiny.flux2_klein, {"distilled": True}, "Flux2KleinPipeline")],
)
def test_guided_pairs_are_refused_where_no_negative_prompt_runs(
    build: Any, options: dict[str, bool], name: str, tmp_path: Path
) -> None:
    pipe = tiny.fresh(build, **options)
    layout = build_layout(find_sites(pipe.transformer), "gate", "cfg", 3.0)
    with pytest.raises(UserError, match=f"{name} is guidance-distilled.*members: single"):
        load_calibration(pipe, save(pipe, layout, layout.start, tmp_path))
    assert not pipe.transformer._forward_hooks


# ---- pipelines without a native backbone


@pytest.mark.parametrize("build", [tiny.wan, tiny.ltx])
def test_one_member_of_weight_one_works_on_any_pipeline(build: Any, tmp_path: Path) -> None:
    unguided = {"guidance_scale": 1.0}
    backbone = Stock.of(tiny.fresh(build), 32, 32, num_frames=1, arguments=unguided)
    layout, attachment = assemble(backbone, CalibrationConfig("gate", "single", weight_mode="fixed"))
    theta = perturbed(layout)
    rows, prompts = layout.rows(torch.from_numpy(theta)[None]), backbone.encode(PROMPTS[:1])
    expected = backbone.sample(attachment, rows, layout.members, prompts, None, backbone.noise([3]), 3).latents
    pipe = tiny.fresh(build)
    assert convention_of(type(pipe)) is None

    def call() -> Tensor:
        return pipe(
            prompt=PROMPTS[0],
            height=32,
            width=32,
            num_frames=1,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
            **unguided,
        ).frames

    plain = call()
    load_calibration(pipe, save(pipe, layout, theta, tmp_path))
    assert torch.equal(call(), expected)
    assert not torch.equal(call(), plain)
    fused = fuse(pipe)
    assert fused is pipe
    torch.testing.assert_close(call(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("members", "mode"), [("cfg", "fixed"), (2, "raw"), ("single", "raw")])
def test_weights_are_refused_on_a_pipeline_of_unknown_convention(members: Any, mode: Any, tmp_path: Path) -> None:
    pipe = tiny.fresh(tiny.wan)
    layout = build_layout(find_sites(pipe.transformer), "gate", members, 3.0, mode)
    with pytest.raises(UserError, match="how WanPipeline batches and combines prompts.*Stock backbone"):
        load_calibration(pipe, save(pipe, layout, perturbed(layout), tmp_path))


def test_two_transformers_are_refused(tmp_path: Path) -> None:
    pipe = SimpleNamespace(transformer=torch.nn.Linear(1, 1), transformer_2=torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="one diffusion transformer"):
        load_calibration(pipe, tmp_path / "calibration.json")  # type: ignore[type-var]


# ---- guidance scales mean the same to all


@every_guided
def test_all_agree_on_what_a_guidance_scale_means(name: str) -> None:
    """The configuration's number becomes the same plain guidance natively, for Stock and for a loaded calibration."""
    case, backbone = CASES[name], CASES[name].make()
    stock, convention = Stock.of(case.pipe(), *case.size), CONVENTIONS[type(case.pipe()).__name__]
    for guidance in (0.5, 2.0, 7.0):
        plain = backbone.plain_guidance(guidance)
        assert plain == stock.plain_guidance(guidance) == convention.plain_guidance(guidance)
        assert convention.own_guidance(plain) == guidance


@pytest.mark.parametrize("name", ["z-image", "krea2"])
def test_what_stock_calibrates_with_another_guidance_formula_loads_as_it_was(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    backbone = Stock.of(case.pipe(), *case.size)
    layout, attachment = assemble(backbone, CalibrationConfig("gate", "cfg", 2.5, "fixed"))
    assert [member.weight for member in layout.members] == [3.5, -2.5]
    theta = perturbed(layout)
    samples = backbone.sample(
        attachment,
        layout.rows(torch.from_numpy(theta)[None].expand(len(PROMPTS), -1)),
        layout.members,
        backbone.encode(PROMPTS),
        backbone.encode(NEGATIVES, negative=True),
        backbone.noise(SEEDS),
        3,
    )
    pictures = case.call(loaded(name, layout, theta, tmp_path), "pt", guidance=1.0)
    torch.testing.assert_close(pictures, samples.latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backbone", ["ZImage", "Krea2"])
def test_predict_and_the_loaded_pipeline_draw_the_same_picture(runs: TinyRuns, tmp_path: Path, backbone: str) -> None:
    """The whole way: a configured guidance scale, the file, the command line, the stock pipeline."""
    case = CASES[{"ZImage": "z-image", "Krea2": "krea2"}[backbone]]
    case.pipe().save_pretrained(tmp_path / "model")
    model = {"pretrained": tmp_path / "model", "dtype": "float32", "height": case.size[0], "width": case.size[1]}
    flags = [f"--model.backbone={backbone}", *(f"--model.backbone.{key}={value}" for key, value in model.items())]
    flags += ["--model.calibration.guidance_scale=2.0", "--model.calibration.weight_mode=guidance"]
    flags += ["--model.strategy.sigma0=0.5", "--data.val=null"]
    answer = runs.fit("a", *flags, "--trainer.max_steps=1")
    assert runs("predict", "b", *flags, f"--model.init_from={answer}", "--data.predict_prompts=[a red circle]") == 0
    [picture] = (runs.latest("b") / "images").iterdir()
    drawn = np.asarray(Image.open(picture), dtype=np.float64)

    pipe = load_calibration(case.pipe(), answer / "calibration.json")
    again = pipe(
        prompt="a red circle",
        negative_prompt="",
        height=case.size[0],
        width=case.size[1],
        num_inference_steps=2,
        guidance_scale=9.0,
        generator=torch.Generator().manual_seed(noise_seed(0, -3, 0, 0)),
        output_type="pt",
    ).images[0]
    assert np.abs(255 * again.permute(1, 2, 0).double().numpy() - drawn).max() <= 0.51


# ---- compiled afterwards


@pytest.mark.parametrize("name", ["flux1-dev", "z-image"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_transformer_that_is_compiled_afterwards_draws_the_same(name: str, whole: bool, tmp_path: Path) -> None:
    case, layout = CASES[name], layout_of(name, "cfg")
    theta = perturbed(layout)
    torch._dynamo.reset()
    expected = native(name, layout, theta)
    pipe, counter = loaded(name, layout, theta, tmp_path), CompileCounter()
    if whole:
        pipe.transformer.compile(backend=counter)
    else:
        for block in {site.block for site in layout.sites}:
            pipe.transformer.get_submodule(block).compile(backend=counter)
    close(case.call(pipe, guidance=2.0), expected)
    graphs = counter.frame_count
    assert graphs
    close(case.call(pipe, guidance=4.0), expected)
    assert counter.frame_count == graphs, "another call needs no new graph"
    torch._dynamo.reset()
