"""The benchmark compares two loops that do the same work, and counts and measures what it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_recipes import TINY_RECIPES
from torch import Tensor, nn

from calibri_lightning.__main__ import main
from calibri_lightning.backbones import SD3
from calibri_lightning.backbones.native import Native
from calibri_lightning.bench.comparison import LoopRun, compare
from calibri_lightning.bench.loops import Job, batched, straightforward
from calibri_lightning.bench.measure import Spread, Timing, interleave, memory_of
from calibri_lightning.bench.models import RANDOM_MODELS, twin
from calibri_lightning.bench.order import spearman
from calibri_lightning.bench.overhead import measure_overhead
from calibri_lightning.bench.precision import Setting
from calibri_lightning.bench.random_models import build_random
from calibri_lightning.bench.roofline import Roof, flops_per_row, matmul_peak
from calibri_lightning.calibration import Layout, attach, build_layout, find_sites
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import FunctionReward, RewardSet
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

CPU = torch.device("cpu")
TEXTS = ("a red circle", "two blue squares", "")


def tiny(name: str = "shapes") -> Native:
    if name == "shapes":
        return SD3.of(build_pipeline(TINY))
    return build_random(TINY_RECIPES[name], "float32", CPU, 2, 16)


def layout_of(backbone: Native, members: str = "cfg") -> Layout:
    return build_layout(find_sites(backbone.transformer), "gate", members, 3.0)  # type: ignore[arg-type]


class Album:
    """A reward that keeps the pictures it is shown: [K, S] of them, in the order in which candidates come."""

    def __init__(self) -> None:
        self.pictures: dict[tuple[int, float], Tensor] = {}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = images.flatten(1) @ torch.linspace(0.1, 1, images[0].numel())
        for image, prompt, score in zip(images, prompts, scores.tolist(), strict=True):
            self.pictures[prompt.index, score] = image
        return scores

    def ordered(self) -> Tensor:
        return torch.stack([self.pictures[key] for key in sorted(self.pictures)])


@pytest.mark.parametrize("name", ["shapes", *TINY_RECIPES])
def test_both_loops_draw_the_same_pictures_and_score_them_alike(name: str) -> None:
    backbone = tiny(name)
    layout = layout_of(backbone, "cfg" if name == "shapes" else TINY_RECIPES[name].members)
    draw = np.random.default_rng(0).normal(size=(3, layout.num_parameters))
    prompts = tuple(Prompt(text, index) for index, text in enumerate(TEXTS))
    job = Job(layout.start + 0.2 * layout.stds * draw, prompts, (1, 2, 3), 2)
    albums = Album(), Album()
    rewards = [RewardSet.of((FunctionReward("album", album), 1.0)) for album in albums]

    slow = straightforward(backbone, layout, rewards[0], job, rows=2)
    fast = batched(backbone, attach(backbone.transformer, layout.sites), layout, rewards[1], job, rows=8)

    pictures = [album.ordered() for album in albums]
    assert len(pictures[0]) == job.num_images == 9
    torch.testing.assert_close(*pictures, atol=2e-5, rtol=0)
    np.testing.assert_allclose(fast, slow, rtol=1e-4)
    assert np.ptp(slow, axis=0).min() > 1e-3, "the candidates differ"
    assert job.num_forwards(layout) == 9 * 2 * len(layout.members)


def test_the_straightforward_loop_encodes_for_each_candidate_and_leaves_no_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, calls = tiny(), list[str]()
    layout = layout_of(backbone)
    encode = backbone.encode_text
    monkeypatch.setattr(backbone, "encode_text", lambda text: (calls.append(text), encode(text))[1])
    job = Job(np.stack([layout.start] * 2), (Prompt("a", 0), Prompt("b", 1)), (1, 2), 1)
    straightforward(backbone, layout, RewardSet({"tiny_rewards:redness": 1.0}), job, rows=8)
    assert calls == ["a", "b", ""] * 2
    attach(backbone.transformer, layout.sites)  # refused where hooks are left


def test_variants_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    timings = interleave({name: lambda n=name: calls.append(n) for name in "abc"}, 2, CPU)
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2, 2]


def test_speedup_is_the_median_of_the_ratios_within_repetitions() -> None:
    fast, slow = Timing((1.0, 2.0, 10.0)), Timing((3.0, 4.0, 15.0))
    assert fast.speedup_over(slow) == Spread(2.0, 1.75, 2.5), "3, 2 and 1.5"
    assert fast.median == 2.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_what_the_run_itself_takes() -> None:
    mebibyte = 2**20
    held = torch.ones(64 * mebibyte // 4)
    large, small = memory_of(lambda: torch.ones(96 * mebibyte // 4).sum(), CPU), memory_of(lambda: held.sum(), CPU)
    if large is None or small is None:
        pytest.skip("this system does not reset the high-water mark")
    assert 90 * mebibyte < large.working_bytes < 130 * mebibyte
    assert small.working_bytes < 32 * mebibyte, "neither what is held nor what was freed counts"
    assert small.before_bytes > 64 * mebibyte


def test_comparison_is_arithmetic() -> None:
    roof = Roof(2e9, {"float32": 1e12, "bfloat16": 4e12})
    runs = [
        LoopRun("slow", Setting("float32"), Timing((8.0,)), None),
        LoopRun("fast", Setting("autocast"), Timing((2.0,)), None),
    ]
    slow, fast = compare(runs, num_images=16, num_forwards=400, roof=roof)
    assert (slow.images_per_second, slow.forwards_per_second, slow.speedup.median) == (2, 50, 1)
    assert (fast.images_per_second, fast.forwards_per_second, fast.speedup.median) == (8, 200, 4)
    assert slow.peak_share == pytest.approx(50 * 2e9 / 1e12)
    assert fast.peak_share == pytest.approx(200 * 2e9 / 4e12)


def test_arithmetic_of_a_forward_is_that_of_its_linear_layers_convolutions_and_attentions() -> None:
    backbone, counted = tiny(), {"linear": 0, "attention": 0}

    def linear(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        counted["linear"] += 2 * module.weight[0].numel() * out.numel()

    real = nn.functional.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: object, **kw: object) -> Tensor:
        counted["attention"] += 4 * q.numel() * k.shape[-2]
        return real(q, k, v, *args, **kw)

    found = flops_per_row(backbone, rows=3)
    layers = [m for m in backbone.transformer.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(linear)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        backbone.velocity(backbone.noise(range(3)), torch.full((3,), 0.5), backbone.encode(["a red circle"] * 3))
    assert min(counted.values()) > 0
    assert found == pytest.approx(sum(counted.values()) / 3)


def test_matmul_peak_is_a_rate() -> None:
    assert 1e6 < matmul_peak(CPU, torch.float32, sizes=(64,), repeats=2) < 1e14


def test_spearman_is_one_for_any_increasing_map() -> None:
    series = np.array([0.3, -1.0, 2.0, 0.7])
    assert spearman(series, np.exp(series)) == pytest.approx(1.0)
    assert spearman(series, -series) == pytest.approx(-1.0)


def test_settings_say_what_they_compute_in() -> None:
    layer, x = nn.Linear(4, 4).requires_grad_(False), torch.ones(1, 4)
    for setting, dtype in (
        (Setting("float32"), torch.float32),
        (Setting("autocast"), torch.bfloat16),
        (Setting("bfloat16", compiled=True), torch.bfloat16),
    ):
        weights = getattr(torch, setting.weights)
        with setting.active(CPU):
            assert layer.to(weights)(x.to(weights)).dtype == dtype == getattr(torch, setting.products)
        layer.float()
    assert Setting("bfloat16", compiled=True).name == "bfloat16, compiled"


def outputs(backbone: Native) -> Tensor:
    return backbone.probe_forward(2).clone()


def test_a_twin_shares_weights_and_nothing_else() -> None:
    backbone = tiny()
    other = twin(backbone)
    pairs = list(zip(backbone.modules().parameters(), other.modules().parameters(), strict=True))
    assert all(mine is theirs for mine, theirs in pairs)
    before = outputs(backbone)
    assert torch.equal(before, outputs(other))
    sites = find_sites(other.transformer)
    attach(other.transformer, sites).set_rows(torch.full((2, len(sites)), 2.0))
    assert not torch.equal(before, outputs(other))
    assert torch.equal(before, outputs(backbone))


@pytest.mark.parametrize("name", ["shapes", "flux.1-dev", "flux.2-klein-4b", "qwen-image", "z-image", "krea-2"])
def test_measuring_the_cost_of_scales_leaves_the_model_as_it_was(name: str) -> None:
    backbone = tiny(name)
    before = outputs(backbone)
    found = measure_overhead(backbone, layout_of(backbone, "single"), rows=2, repeats=2)
    assert torch.equal(before, outputs(backbone))
    assert found.plain_seconds > 0
    assert found.attached.median > -1


RELEASED = {
    "sd3-medium": 2.03,
    "sd3.5-medium": 2.24,
    "sd3.5-large": 8.06,
    "flux.1-dev": 11.9,
    "flux.2-dev": 32.2,
    "flux.2-klein-4b": 3.9,
    "flux.2-klein-9b": 9.1,
    "qwen-image": 20.4,
    "z-image": 6.15,
    "lumina-image-2": 2.61,
}
"""Parameters of the released transformers, in 10^9."""


@pytest.mark.parametrize("name", RELEASED)
def test_random_models_have_the_released_sizes(name: str) -> None:
    import diffusers

    model = RANDOM_MODELS[name]
    with torch.device("meta"):
        transformer = getattr(diffusers, model.transformer)(**model.config, **model.slice(None))
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(RELEASED[name], rel=0.03)


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_slices_keep_the_proportion_of_blocks(name: str) -> None:
    model = RANDOM_MODELS[name]
    total = sum(model.blocks.values())
    assert model.slice(total) == model.slice(None) == model.blocks
    for count in range(1, total + 1):
        cut = model.slice(count)
        assert sum(cut.values()) == count
        assert all(abs(cut[kind] - count * whole / total) < 1 for kind, whole in model.blocks.items())


def test_random_models_are_always_the_same_and_leave_random_state_and_dtype_alone(untouched_rng: None) -> None:
    one, other = (build_random(TINY_RECIPES["flux.1-dev"], "bfloat16", CPU, 2, 16) for _ in range(2))
    assert torch.equal(outputs(one), outputs(other))
    assert one.transformer.dtype == one.pipeline.vae.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert not torch.equal(one.encode_text("a").tensors["prompt"], one.encode_text("b").tensors["prompt"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a benchmark that takes a moment."""
    monkeypatch.setitem(RANDOM_MODELS, "sd3.5-medium", TINY_RECIPES["sd3.5-medium"])  # type: ignore[arg-type]
    monkeypatch.setattr("calibri_lightning.bench.roofline.SIZES", (64,))
    monkeypatch.setattr("calibri_lightning.bench.order.NUM_CANDIDATES", 4)
    model = ["--model", "sd3.5-medium", "--layers", "2", "--resolution", "16"]
    work = ["--popsize", "2", "--bucket", "2", "--steps", "1", "--rows", "4"]
    return ["bench", *model, *work, "--repeats", "2", "--forward-repeats", "2"]


def test_command_prints_a_table_and_writes_json_and_a_plot(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    more = ["--precision", "float32", "autocast", "--order", "--popsizes", "4", "2", "--out", str(out)]
    assert main([*small, *more]) == 0
    report = json.loads(out.read_text())
    names = ["straightforward, float32", "batched, float32", "batched, autocast"]
    assert [loop["name"] for loop in report["loops"]] == names
    assert report["loops"][0]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert list(report["roof"]["matmul_peaks"]) == ["float32", "bfloat16"]
    assert [check["setting"] for check in report["order"]] == ["autocast"]
    assert [point["popsize"] for point in report["growth"]] == [2, 4]
    assert all(len(point["timing"]["seconds"]) == 2 for point in report["growth"])
    for share in ("scoring_share", "decoding_share", "encoding_share", "forward_peak_share"):
        assert report[share] > 0
    assert Image.open(out.with_suffix(".png")).size == (1050, 510)
    printed = capsys.readouterr().out
    for words in (*names, "images/s", "roofline", "attached", "folded", "Spearman", "popsize    4", "7 sites"):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "sd9"], ["sd9", "sd3.5-medium"]),
        (["--model", "shapes", "--layers", "3"], ["--layers", "shapes"]),
        (["--model", "shapes", "--resolution", "64"], ["--resolution", "shapes"]),
        (["--model", "flux.1-dev", "--layers", "0"], ["--layers is 0", "at least 1"]),
        (["--popsize", "0"], ["--popsize is 0", "at least 1"]),
        (["--popsizes", "4", "-1"], ["--popsizes is -1", "at least 1"]),
        (["--rows", "1"], ["--rows is 1", "takes 2"]),
        (["--model", "sd3-medium", "--resolution", "100"], ["100", "multiple of 16", "96"]),
        (["--precision", "float8"], ["float8", "bfloat16"]),
        (["--precision", "bfloat16", "--order"], ["--order", "float32"]),
        (["--order"], ["--order", "--compile"]),
        (["--model", "lumina-image-2", "--layers", "99"], ["--layers is 99", "26 blocks"]),
        (["--device", "tpu9"], ["tpu9", "cuda"]),
        (["--device", "cuda:99"], ["cuda:99", "CUDA device"]),
        (["--out", "no/such/folder/x.json"], ["no/such/folder", "does not exist"]),
        (["--fast"], ["--fast", "bench --help"]),
    ],
)
def test_bad_options_are_refused_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for word in words:
        assert word in error
