"""What only a GPU can show: the same pictures and rewards as on the CPU, and no stray synchronisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_tools import candidates, denoising, trainable
from tiny_clip import save_clip

from calibri_lightning.backbones import SD3
from calibri_lightning.calibration import attach, build_layout, find_sites
from calibri_lightning.planning import Situation, make_plan, sketch_pipeline
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet
from calibri_lightning.rewards.pickscore import PickScore
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.kernels import CPS, DanceSDE, FlowSDE
from calibri_lightning.sampling.rows import automatic_rows, sample_once
from calibri_lightning.sampling.trajectory import replay, roll_out
from calibri_lightning.shapes.captions import prompts
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _evaluator(device: str) -> Evaluator:
    backbone = SD3.of(build_pipeline(TINY))
    backbone.to(device)
    sites = find_sites(backbone.transformer)
    layout = build_layout(sites, "gate", "cfg", 3.0, "guidance")
    return Evaluator(backbone, attach(backbone.transformer, sites), layout, RewardSet({"shapes": 1.0}), 16)


def test_rewards_and_pictures_agree_with_the_cpu() -> None:
    chosen, seeds = prompts("val")[:6], list(range(6))
    images = {}
    for device in ("cpu", "cuda"):
        evaluator = _evaluator(device)
        theta = evaluator.layout.start[None]
        images[device] = torch.cat([i.cpu() for _, i in evaluator.images(theta, chosen, seeds, 3)])
    # TF32 is off by default for matrix products, so only the order of sums differs.
    torch.testing.assert_close(images["cuda"], images["cpu"], atol=2e-3, rtol=0)


def test_scales_of_one_are_the_identity_bit_for_bit() -> None:
    evaluator = _evaluator("cuda")
    backbone, attachment = evaluator.backbone, evaluator.attachment
    noise, sigma = backbone.noise(range(4)), torch.full((4,), 0.5, device="cuda")
    conditioning = backbone.encode(["a red circle"] * 4)
    with torch.no_grad():
        attachment.set_rows(None)
        plain = backbone.velocity(noise, sigma, conditioning)
        with attachment.rows(torch.ones(4, len(attachment.sites))):
            assert torch.equal(backbone.velocity(noise, sigma, conditioning), plain)


def test_no_step_of_the_sampler_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first forward to the last step; what a unit needs is sent before."""
    evaluator = _evaluator("cuda")
    backbone, original = evaluator.backbone, evaluator.backbone.velocity
    prompt = prompts("val")[0]
    sample_once(backbone, evaluator.attachment, evaluator.layout, prompt, 4)  # constants and embeddings

    def velocity(*arguments: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        return original(*arguments)

    monkeypatch.setattr(backbone, "velocity", velocity)
    try:
        sample_once(backbone, evaluator.attachment, evaluator.layout, prompt, 4)
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scoring_on_a_stream_of_its_own_changes_no_bit() -> None:
    chosen, seeds = prompts("val")[:6], list(range(6))
    rewards = []
    for overlap in (True, False):
        evaluator = _evaluator("cuda")
        evaluator.overlap_scoring = overlap
        rewards.append(evaluator.evaluate(evaluator.layout.start[None].repeat(5, 0), chosen, seeds, 3).rewards)
    assert rewards[0].tobytes() == rewards[1].tobytes()


def test_the_plan_and_the_measured_rows_agree_with_the_device() -> None:
    backbone = SD3("shapes")
    backbone.to("cuda")
    sites = find_sites(backbone.transformer)
    layout = build_layout(sites, "gate", "cfg", 3.0, "guidance")
    attachment, prompt = attach(backbone.transformer, sites), prompts("val")[0]
    sketch = SD3.of(sketch_pipeline(SD3.pipelines, "shapes", "float32", None))
    plan = make_plan(sketch, Situation(layout, 128, num_texts=1))
    sample_once(backbone, attachment, layout, prompt, 64)  # the workspaces of the libraries stay allocated
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sample_once(backbone, attachment, layout, prompt, 64)
    assert plan.sampling_bytes == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)
    assert automatic_rows(backbone, attachment, layout, prompt) == 128


def test_pickscore_scores_where_the_pictures_are(tmp_path: Path) -> None:
    pictures = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    texts = [Prompt(text, i) for i, text in enumerate(("cat", "red dog", "cat", "a", "blue"))]
    folder = str(save_clip(tmp_path))
    on_cpu = PickScore(folder)(pictures, texts)
    on_gpu = PickScore(folder)(pictures.cuda(), texts)
    assert on_gpu.is_cuda
    assert PickScore(folder, device="cpu")(pictures.cuda(), texts).device.type == "cpu"
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("members", ["single", "cfg"])
def test_a_replay_with_gradients_equals_its_roll_out_bit_for_bit(members: str, dtype: torch.dtype) -> None:
    """Other attention kernels may run where gradients are enabled: the ratio before the first update must be 1."""
    pipe = build_pipeline(TINY)
    pipe.transformer.to(dtype)
    backbone = SD3.of(pipe)
    backbone.to("cuda")
    layout = build_layout(find_sites(backbone.transformer), "gate", members, 3.0)
    rows, seeds = trainable(candidates(layout, 3)), [1, 2, 3]
    with denoising(backbone, layout, rows, ["a red circle"] * 3, [""] * 3) as denoiser:
        for kernel in (FlowSDE(), DanceSDE(), CPS()):
            kept, offloaded = (
                roll_out(denoiser, backbone.noise(seeds), kernel, (0, 1), seeds, offload=offload)
                for offload in (False, True)
            )
            assert torch.equal(kept.log_probs, offloaded.log_probs)
            for index in range(2):
                with denoiser.attached():
                    log_prob = replay(denoiser, offloaded, index, kernel).log_prob
                    assert torch.equal(log_prob, kept.log_probs[index])
                    log_prob.sum().backward()
    assert rows.scales.grad is not None
    assert rows.scales.grad.isfinite().all()
