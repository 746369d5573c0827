"""Compiled blocks: as many graphs as there are kinds of block and sizes of batch, whatever the candidates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import TinyRuns
from torch._dynamo.testing import CompileCounter

from calibri_lightning import SD3, CalibriModule, PairES, UserError, read_calibration
from calibri_lightning.backbones.compiling import compile_blocks
from calibri_lightning.calibration import attach, find_sites
from calibri_lightning.prompts import Prompt
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.rows import sample_once
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

KINDS = 3
"""Dual attention, plain, and the last block."""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def tiny() -> SD3:
    return SD3.of(build_pipeline(TINY))


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Takes the place of inductor in runs of the whole program."""
    made = CompileCounter()
    monkeypatch.setattr("calibri_lightning.engine.compile_blocks", partial(compile_blocks, backend=made))
    monkeypatch.setattr("calibri_lightning.engine.check_compiler", lambda: None)
    return made


@torch.no_grad()
def test_new_scales_need_no_new_graph_and_another_number_of_rows_does() -> None:
    eager, compiled, counter = tiny(), tiny(), CompileCounter()
    sites = find_sites(eager.transformer)
    attachments = [attach(backbone.transformer, sites) for backbone in (eager, compiled)]
    assert compile_blocks(compiled.transformer, counter) == 3
    # Four sizes of three kinds are more graphs than torch allows by default.
    for size in range(2, 6):
        x, sigma, seen = eager.noise(range(size)), torch.full((size,), 0.5), eager.encode([""] * size)
        for seed in range(3):
            outputs = []
            for backbone, attachment in zip((eager, compiled), attachments, strict=True):
                attachment.set_rows(torch.rand(size, len(sites), generator=torch.Generator().manual_seed(seed)))
                outputs.append(backbone.velocity(x, sigma, seen))
            torch.testing.assert_close(*outputs)
            assert counter.frame_count == KINDS * (size - 1)


def test_candidates_and_generations_of_a_module_share_graphs(tiny_folder: Path, counter: CompileCounter) -> None:
    folder, rewards = str(tiny_folder / "model"), {"tiny_rewards:redness": 1.0}
    module = CalibriModule(SD3(folder), rewards, PairES(), rows_per_forward=8, compile=True)
    eager = CalibriModule(SD3(folder), rewards, PairES(), rows_per_forward=8)
    module.engine.start((), nullcontext, int)
    prompts = tuple(Prompt(text, index) for index, text in enumerate(("a red circle", "a blue square")))
    draw = np.random.default_rng(0)
    assert counter.frame_count == 0
    for _ in range(3):
        thetas = eager.layout.start + 0.1 * eager.layout.stds * draw.normal(size=(4, eager.layout.num_parameters))
        found, expected = (evaluate(m.engine.evaluator, thetas, prompts) for m in (module, eager))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert counter.frame_count == KINDS


def evaluate(evaluator: Evaluator, thetas: np.ndarray, prompts: tuple[Prompt, ...]) -> np.ndarray:
    return evaluator.evaluate(thetas, prompts, (1, 2), num_steps=2).rewards


@pytest.mark.usefixtures("no_plots")
def test_a_fit_compiles_where_the_configuration_says_so(runs: TinyRuns, counter: CompileCounter) -> None:
    plain = runs.fit("plain", "--trainer.max_steps=4")
    assert counter.frame_count == 0
    compiled = runs.fit("compiled", "--model.compile=true", "--trainer.max_steps=4")
    # Units of one, two and three pictures, four generations and five validations.
    assert counter.frame_count == 3 * KINDS
    values = [np.array(read_calibration(path / "calibration.json").values) for path in (plain, compiled)]
    np.testing.assert_allclose(values[1], values[0], atol=1e-3)


@pytest.mark.usefixtures("no_plots", "counter")
def test_a_search_resumes_only_with_the_same_bits(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.fit("a", "--model.compile=true", "--trainer.max_steps=1")
    resume = f"--ckpt_path={path / 'checkpoints' / 'last.ckpt'}"
    assert runs("fit", "a", "--trainer.max_steps=2", resume) == 2
    assert "compiled blocks" in capsys.readouterr().err


def test_rows_and_attention_back_ends_are_tried_before_anything_is_compiled(
    tiny_folder: Path, counter: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of rows that is tried would cost graphs that no later forward uses."""
    tried: list[int] = []

    def prepare(backbone: SD3, *texts: Any) -> None:
        if not tried:
            tried.append(len(backbone.probe_forward(1)))

    def measure(*model: Any) -> int:
        for pictures in (1, 3, 4):
            sample_once(*model, pictures)
            tried.append(2 * pictures)
        return 8

    monkeypatch.setattr("calibri_lightning.engine.automatic_rows", measure)
    monkeypatch.setattr(SD3, "prepare", prepare)
    module = CalibriModule(SD3(str(tiny_folder / "model")), {"tiny_rewards:redness": 1.0}, PairES(), compile=True)
    prompts = (Prompt("a red circle", 0),)
    for _ in range(2):  # as many stages
        module.engine.start(prompts, nullcontext, int)
        assert counter.frame_count == 0
    assert tried == [1, 2, 6, 8]
    module.engine.evaluator.evaluate(module.layout.start[None].repeat(4, 0), prompts, (1,), num_steps=2)
    assert counter.frame_count == KINDS, "the blocks are compiled, for the rows of a unit alone"


def test_a_missing_compiler_is_named_before_the_first_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    backbone = tiny()
    with pytest.raises(UserError, match=r"C\+\+ compiler.*leave compile out"):
        compile_blocks(backbone.transformer)
    assert all(module._compiled_call_impl is None for module in backbone.transformer.modules())


@pytest.mark.slow
@torch.no_grad()
def test_what_inductor_writes_draws_the_same_pictures() -> None:
    eager, compiled = tiny(), tiny()
    sites = find_sites(eager.transformer)
    scales = torch.linspace(0.5, 1.5, 2 * len(sites)).view(2, -1)
    outputs = []
    for backbone in (eager, compiled):
        attach(backbone.transformer, sites).set_rows(scales)
        if backbone is compiled:
            compile_blocks(backbone.transformer)
        outputs.append(backbone.probe_forward(2))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
