"""A plan counts what loading would make, exactly, and what sampling takes, nearly; and loads nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from memory_tools import measured_peak
from tiny_runs import TinyRuns
from torch import nn

from calibri_lightning.__main__ import main
from calibri_lightning.adapters.lora import LoraOptions, add_lora, lora_parameters
from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Lumina2, QwenImage, ZImage
from calibri_lightning.backbones.loading import load_pipeline
from calibri_lightning.backbones.native import Native
from calibri_lightning.calibration import Layout, attach, build_layout, find_sites
from calibri_lightning.calibration.scales import Rows
from calibri_lightning.errors import UserError
from calibri_lightning.planning import Situation, make_plan, sketch_pipeline
from calibri_lightning.planning.command import _concurrency
from calibri_lightning.planning.estimate import network_sizes
from calibri_lightning.planning.live import FusedAttention, LiveBytes
from calibri_lightning.planning.training import TrainingNeeds, plan_training, sketch_policy
from calibri_lightning.prompts import Prompt
from calibri_lightning.sampling.denoiser import Denoiser
from calibri_lightning.sampling.rows import sample_once
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

TOLERANCE = {"sampling": 0.1, "decoding": 0.15}
"""Of the activations' peak, against what torch's profiler sees the allocator give."""

FAMILIES: dict[str, tuple[type[Native], Callable[[], DiffusionPipeline], tuple[int, int]]] = {
    "sd3": (SD3, lambda: build_pipeline(TINY), (16, 16)),
    "flux1": (FLUX1, lambda: tiny.fresh(tiny.flux1), (32, 48)),
    "klein": (FLUX2, lambda: tiny.fresh(tiny.flux2_klein), (32, 48)),
    "qwen": (QwenImage, lambda: tiny.fresh(tiny.qwen_image), (32, 48)),
    "z_image": (ZImage, lambda: tiny.fresh(tiny.z_image), (32, 48)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        if not (root / family).is_dir():
            FAMILIES[family][1]().save_pretrained(root / family)
        return root / family

    return folder


def components(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["sd3", "flux1", "klein", "qwen"])
def test_parameters_and_bytes_are_those_of_the_loaded_model(
    family: str, dtype: Any, folders: Callable[[str], Path]
) -> None:
    cls, _, size = FAMILIES[family]
    real = load_pipeline(cls.pipelines, str(folders(family)), dtype, None)
    sketch = sketch_pipeline(cls.pipelines, str(folders(family)), dtype, None)
    assert network_sizes(components(sketch)) == network_sizes(components(real))
    for name, network in components(sketch).items():
        kinds = {parameter.device.type for parameter in network.parameters()}
        assert kinds == {"meta"} or name == "text_encoder_3", "one vector of T5 is read"
    assert cls.of(sketch, *size).tokens_per_row == cls.of(real, *size).tokens_per_row


def test_a_sketch_needs_no_weights(folders: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folders("flux1"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    sketch = sketch_pipeline(FLUX1.pipelines, str(tmp_path / "bare"), "bfloat16", None)
    assert FLUX1.of(sketch).tokens_per_row > 512
    with pytest.raises(UserError, match="has no weights"):
        load_pipeline(FLUX1.pipelines, str(tmp_path / "bare"), "bfloat16", None)


def test_live_bytes_of_a_known_program() -> None:
    kept = torch.zeros(100)
    with LiveBytes(torch.device("cpu")) as live:
        a = torch.zeros(1000)  # 4,000
        a.add_(1)
        b = a.view(10, 100)[2:5]
        c = b + 1  # 1,200
        assert live.peak == 5200
        del a, b
        d = kept * 2  # 400
        e = torch.zeros(1000, dtype=torch.float64)  # 8,000, beside 1,200 and 400
        assert live.peak == 9600
        del c, d, e
        assert live._now == 0


def make_layout(backbone: Native) -> Layout:
    return build_layout(find_sites(backbone.transformer), "gate", 2, 3.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_agree_with_what_a_real_forward_takes(family: str, folders: Callable[[str], Path]) -> None:
    cls, _, size = FAMILIES[family]
    sketch = cls.of(sketch_pipeline(cls.pipelines, str(folders(family)), "float32", None), *size)
    plan = make_plan(sketch, Situation(make_layout(sketch), rows_per_forward=16, num_texts=3))
    assert plan.sampling_bytes is not None
    assert plan.decoding_bytes is not None

    real = cls.of(load_pipeline(cls.pipelines, str(folders(family)), "float32", None), *size)
    real.encode_text = lambda text: real.example()  # type: ignore[method-assign]
    layout = make_layout(real)
    attachment = attach(real.transformer, layout.sites)
    sample_once(real, attachment, layout, Prompt("", 0), 8)  # once before: constants and caches
    sampling = measured_peak(lambda: sample_once(real, attachment, layout, Prompt("", 0), 8))
    latents = torch.zeros(8, *real.latent_shape())
    decoding = measured_peak(lambda: real.decode(latents)) + latents.nbytes
    assert plan.sampling_bytes == pytest.approx(sampling, rel=TOLERANCE["sampling"])
    assert plan.decoding_bytes == pytest.approx(decoding, rel=TOLERANCE["decoding"])


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["sd3", "flux1", "qwen"])
def test_training_agrees_with_what_a_real_backward_takes(
    family: str, checkpoints: bool, folders: Callable[[str], Path]
) -> None:
    cls, _, size = FAMILIES[family]
    sketch = cls.of(sketch_pipeline(cls.pipelines, str(folders(family)), "float32", None), *size)
    needs = TrainingNeeds("lora", 8, checkpoints, has_ema=True, kept_images=16, kept_latents=6, on_device=True)
    layout = make_layout(sketch)
    policy = sketch_policy(sketch, layout, "lora", LoraOptions(rank=4))
    plan = plan_training(sketch, layout, policy, needs)
    assert plan.backward_bytes is not None

    real = cls.of(load_pipeline(cls.pipelines, str(folders(family)), "float32", None), *size)
    layout = make_layout(real)
    live = sketch_policy(real, layout, "lora", LoraOptions(rank=4))
    tensors = list(live.parameters().values())
    assert plan.parameters == sum(tensor.numel() for tensor in tensors)
    assert plan.parameter_bytes == plan.gradient_bytes == sum(tensor.nbytes for tensor in tensors)
    assert plan.optimizer_bytes == 2 * plan.parameter_bytes
    assert plan.copy_bytes == 4 * plan.parameter_bytes, "start, best, average, and the average as a copy"
    assert plan.trajectory_bytes == 16 * 6 * real.noise([0]).nbytes
    if checkpoints:
        real.transformer.enable_gradient_checkpointing()
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    rows = layout.rows(torch.tensor(layout.start)[None])
    spread = Rows(rows.scales[[0] * 8], rows.weights[[0] * 8])
    text, noise = real.example().take([0] * 8), real.noise(range(8))
    attachment = attach(real.transformer, layout.sites)

    def work() -> None:
        denoiser = Denoiser(real, attachment, spread, layout.members, text, None, 2)
        with denoiser.attached():
            denoiser.velocity(noise, 0).square().sum().backward()

    work()
    assert plan.backward_bytes == pytest.approx(measured_peak(work), rel=0.2)


def test_memory_grows_linearly_with_rows_and_not_with_anything_else(folders: Callable[[str], Path]) -> None:
    backbone = FLUX1.of(sketch_pipeline(FLUX1.pipelines, str(folders("flux1")), "bfloat16", None), 32, 48)
    layout = make_layout(backbone)
    peaks = [make_plan(backbone, Situation(layout, rows, num_texts=3)).sampling_bytes or 0 for rows in (2, 8, 14)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.01)


def test_phases_say_where_text_encoders_are(folders: Callable[[str], Path]) -> None:
    from calibri_lightning.backbones.memory import MemoryOptions

    backbone = FLUX1.of(sketch_pipeline(FLUX1.pipelines, str(folders("flux1")), "bfloat16", None), 32, 48)
    situation = Situation(make_layout(backbone), 4, num_texts=10)
    plans = {}
    for choice in ("offload", "keep", "cpu", "drop"):
        backbone.use_memory(MemoryOptions(text_encoders=choice))  # type: ignore[arg-type]
        plans[choice] = make_plan(backbone, situation).phases
    sizes = {size.name: size.bytes for size in network_sizes(components(backbone.pipeline))}
    encoders = sizes["text_encoder"] + sizes["text_encoder_2"]
    others = sizes["transformer"] + sizes["vae"]
    assert plans["offload"]["encoding"] == plans["drop"]["encoding"]
    assert plans["offload"]["encoding"] == plans["keep"]["encoding"] == others + encoders
    assert plans["cpu"]["encoding"] == others
    for phase in ("sampling", "decoding"):
        # Small constants are made the first time and stay.
        assert plans["keep"][phase] == pytest.approx(plans["offload"][phase] + encoders, abs=5000)
        assert plans["cpu"][phase] == pytest.approx(plans["offload"][phase], abs=5000)
        assert encoders > 20_000


def test_automatic_rows_fill_the_device(folders: Callable[[str], Path]) -> None:
    backbone = FLUX1.of(sketch_pipeline(FLUX1.pipelines, str(folders("flux1")), "bfloat16", None), 32, 48)
    layout = make_layout(backbone)
    one = make_plan(backbone, Situation(layout, 2, 3))
    resident = one.phases["encoding"]
    room = int(resident + 6 * (one.sampling_bytes or 0))
    plan = make_plan(backbone, Situation(layout, None, 3, device_bytes=room))
    assert plan.pictures_per_unit == 4, "8 pictures would take more than 80 % of what the weights leave"
    assert make_plan(backbone, Situation(layout, None, 3, device_bytes=2**40)).rows_per_forward == 128


def test_a_model_that_reads_numbers_is_planned_without_its_forward() -> None:
    backbone = Lumina2.of(tiny.fresh(tiny.lumina2), 32, 48)
    for network in components(backbone.pipeline).values():
        network.to("meta")
    plan = make_plan(backbone, Situation(make_layout(backbone), 4, num_texts=3))
    assert plan.sampling_bytes is None
    assert plan.decoding_bytes is not None
    assert any("Activations while sampling are not counted" in note for note in plan.notes)


def test_fused_attention_leaves_real_tensors_alone() -> None:
    query = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.scaled_dot_product_attention(query, query, query)
    with FusedAttention():
        assert torch.equal(nn.functional.scaled_dot_product_attention(query, query, query), expected)
        sketched = nn.functional.scaled_dot_product_attention(*[query.to("meta")] * 3)
    assert sketched.shape == expected.shape


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("native", "stock"):
        monkeypatch.setattr(
            f"calibri_lightning.backbones.{name}.load_pipeline", lambda *_: pytest.fail("a model was loaded")
        )


@pytest.mark.usefixtures("nothing_is_loaded")
def test_the_command_prints_text_and_json(
    runs: TinyRuns, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--config", str(runs.config), f"--trainer.default_root_dir={runs.folder}"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not runs.folder.exists(), "a plan leaves nothing behind"
    transformer = build_pipeline(TINY).transformer
    parameters = sum(p.numel() for p in transformer.parameters())
    assert {"name": "transformer", "parameters": parameters} == {
        key: next(n for n in plan["networks"] if n["name"] == "transformer")[key] for key in ("name", "parameters")
    }
    assert f"{parameters:,}" in text
    assert plan["rows_per_forward"] == 6
    assert plan["num_texts"] == 6 + 3 + 3 + 1, "train, val, test and the empty negative prompt"
    assert plan["peak"] == max(plan["phases"].values())
    assert "expected peak of the device" in text


@pytest.mark.usefixtures("nothing_is_loaded")
def test_the_command_counts_training(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--config", str(runs.config), "--model.strategy=FlowGRPO", "--model.num_steps=4"]
    assert main([*arguments, "--model.lora.rank=4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    transformer = build_pipeline(TINY).transformer
    add_lora(transformer, LoraOptions(rank=4), 0)
    assert plan["training"]["parameters"] == sum(p.numel() for p in lora_parameters(transformer).values())
    assert plan["phases"]["training"] > plan["training"]["backward_bytes"] > 0
    assert main([*arguments, "--model.strategy.train=scales"]) == 0
    assert "forward and backward" in capsys.readouterr().out
    assert main([*arguments, "--model.strategy.window=RandomWindow", "--model.strategy.window.size=9"]) == 2
    assert "size 9" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_is_loaded")
def test_turns_are_planned_for_what_they_need_at_most(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    """A search in turn with a policy trains the scales beside its LoRA, and takes no more memory for gradients."""
    policy = {"class_path": "FlowGRPO", "init_args": {"train": "both", "pictures_per_unit": 4}}
    search = {"class_path": "CMAES", "init_args": {"popsize": 4, "bucket_size": 2}}
    phases = [{"strategy": strategy, "steps": 1} for strategy in (search, policy)]
    plans = []
    for strategy in (policy, {"class_path": "Alternate", "init_args": {"phases": phases}}):
        words = ["plan", "--config", str(runs.config), f"--model.strategy={json.dumps(strategy)}"]
        assert main([*words, "--model.num_steps=4", "--model.lora.rank=4", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out)["training"])
    assert plans[0] == plans[1]
    assert plans[0]["parameters"] > 0


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device_memory=none"], "takes a number of GiB"),
        (["--model.backbone.pretrained=nobody/nothing"], "not in the local cache"),
        # One pattern each: what follows a second one would be taken for a file to fetch.
        (["--model.backbone.pretrained=nobody/nothing"], "nobody/nothing --exclude '*.safetensors' --exclude '*.bin'"),
        (["--model.backbone.pretrained=/"], "model_index.json"),
        (["--model.num_stepz=3"], "num_stepz"),
        (["--model.backbone=Stock", "--model.backbone.pretrained=shapes"], "native backbone"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    runs: TinyRuns, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["plan", "--config", str(runs.config), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_pictures_of_all_units_that_are_scored_at_once_are_counted(folders: Callable[[str], Path]) -> None:
    backbone = FLUX1.of(sketch_pipeline(FLUX1.pipelines, str(folders("flux1")), "bfloat16", None), 32, 48)
    phases = [make_plan(backbone, Situation(make_layout(backbone), 4, 3, num_scoring=n)).phases for n in (0, 1, 3)]
    of_a_unit = 2 * 2 * 3 * 32 * 48 * 4  # 2 pictures, as they are and without NaN
    # The first plan has small constants of its own.
    assert phases[1]["sampling"] - phases[0]["sampling"] == pytest.approx(of_a_unit, abs=5000)
    assert phases[2]["sampling"] - phases[1]["sampling"] == 2 * of_a_unit


def test_servers_tell_how_many_units_are_scored_at_once() -> None:
    two = {"urls": ["http://a", "http://b"], "per_server": 3}
    assert _concurrency({"shapes": 1.0, "pickscore": {"weight": 1.0, "reward": None, "options": {}}}) == 1
    assert _concurrency({"h": {"reward": "remote", "options": two}, "p": 1.0}) == 6
    assert _concurrency({"h": {"reward": "remote", "options": {"urls": "http://a"}}}) == 1
