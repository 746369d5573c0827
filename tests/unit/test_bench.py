"""The benchmark compares two loops that do the same work, and counts what it claims to count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from calibri_lightning.__main__ import main
from calibri_lightning.backbones import SD3
from calibri_lightning.backbones.compiling import compile_blocks
from calibri_lightning.bench.loops import Job, batched, flops_per_row, spearman, straightforward
from calibri_lightning.bench.measure import Timing, interleave, matmul_peak
from calibri_lightning.calibration import attach, build_layout, find_sites
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

CPU = torch.device("cpu")


def tiny() -> SD3:
    return SD3.of(build_pipeline(TINY))


def test_variants_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]


def test_speedup_is_the_median_of_the_ratios_within_repetitions() -> None:
    fast, slow = Timing((1.0, 2.0, 10.0), None), Timing((3.0, 4.0, 15.0), None)
    assert fast.speedup_over(slow) == 2.0, "of 3, 2 and 1.5"
    assert fast.median == 2.0
    assert Timing((1.0, 3.0), None).median == 2.0


def test_both_loops_give_the_same_rewards() -> None:
    backbone = tiny()
    layout = build_layout(find_sites(backbone.transformer), "gate", "cfg", 3.0, "guidance")
    draw = np.random.default_rng(0).normal(size=(3, layout.num_parameters))
    prompts = tuple(Prompt(text, index) for index, text in enumerate(("a red circle", "two blue squares")))
    job = Job(layout.start + 0.2 * draw, prompts, (1, 2), 3)
    rewards = RewardSet({"tiny_rewards:redness": 1.0})

    slow = straightforward(backbone, layout, rewards, job)
    fast = batched(backbone, attach(backbone.transformer, layout.sites), layout, rewards, job, rows=8)

    np.testing.assert_allclose(fast, slow, rtol=1e-5)
    assert np.ptp(slow) > 1e-4, "the candidates differ"
    assert (job.num_images, job.num_forwards(layout)) == (6, 36)


def test_arithmetic_of_a_forward_is_that_of_its_linear_layers_convolutions_and_attentions() -> None:
    backbone = tiny()
    counted = {"linear": 0, "attention": 0}

    def linear(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        per_output = module.weight[0].numel()
        counted["linear"] += 2 * per_output * out.numel()

    real = nn.functional.scaled_dot_product_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object, **kw: object) -> torch.Tensor:
        counted["attention"] += 4 * q.numel() * k.shape[-2]
        return real(q, k, v, *args, **kw)

    expected_of = flops_per_row(backbone, rows=3)
    handles = [
        m.register_forward_hook(linear) for m in backbone.transformer.modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        with torch.no_grad():
            backbone.velocity(backbone.noise(range(3)), torch.full((3,), 0.5), backbone.encode([""] * 3))
    for handle in handles:
        handle.remove()
    assert counted["attention"] > 0
    assert expected_of == pytest.approx(sum(counted.values()) / 3)


def test_spearman_is_one_for_any_increasing_map() -> None:
    series = np.array([0.3, -1.0, 2.0, 0.7])
    assert spearman(series, np.exp(series)) == pytest.approx(1.0)
    assert spearman(series, -series) == pytest.approx(-1.0)


def test_matmul_peak_is_a_rate() -> None:
    assert 1e6 < matmul_peak(CPU, torch.float32, size=64) < 1e14


def test_new_scales_need_no_new_graph_and_equal_blocks_share_one() -> None:
    eager, compiled = tiny(), tiny()
    sites = find_sites(eager.transformer)
    attachments = [attach(backbone.transformer, sites) for backbone in (eager, compiled)]
    counter = CompileCounter()
    torch._dynamo.reset()
    assert compile_blocks(compiled.transformer, backend=counter) == 3
    x, sigma, seen = eager.noise(range(4)), torch.full((4,), 0.5), eager.encode([""] * 4)
    graphs = []
    for seed in range(3):
        scales = torch.rand(4, len(sites), generator=torch.Generator().manual_seed(seed))
        outputs = []
        for backbone, attachment in zip((eager, compiled), attachments, strict=True):
            attachment.set_rows(scales)
            with torch.no_grad():
                outputs.append(backbone.velocity(x, sigma, seen))
        torch.testing.assert_close(*outputs)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[0] <= 3, "no more than one a kind of block"
    assert len(set(graphs)) == 1, "a new candidate compiled anew"


def test_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    small = ["--popsize", "2", "--bucket", "1", "--steps", "1", "--repeats", "1", "--rows", "4"]
    assert main(["bench", *small, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [loop["name"] for loop in report["loops"]] == ["straightforward float32", "batched float32"]
    assert report["loops"][0]["speedup"] == 1.0
    assert report["flops_per_row"] > 1e8
    printed = capsys.readouterr().out
    for word in ("images/s", "roofline", "attached", "folded"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "sd9"], ["sd9", "sd3.5-medium"]),
        (["--layers", "3"], ["--layers", "shapes"]),
        (["--popsize", "0"], ["--popsize is 0", "at least 1"]),
        (["--model", "sd3-medium", "--resolution", "100"], ["100", "multiple of 16"]),
    ],
)
def test_bad_options_are_refused(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in words:
        assert word in error
