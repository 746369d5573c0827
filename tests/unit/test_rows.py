"""rows_per_forward: auto follows its rule, fits the memory it is given, and stays what it was on resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from tiny_runs import TinyRuns

from calibri_lightning import engine as engine_file
from calibri_lightning.backbones import SD3, QwenImage, Stock
from calibri_lightning.calibration import attach, build_layout, find_sites
from calibri_lightning.prompts import Prompt
from calibri_lightning.sampling import rows as rows_file
from calibri_lightning.sampling.rows import MOST_ROWS, TOKENS_PER_FORWARD, automatic_rows, sample_once
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

PROMPT = Prompt("a red circle", 0)
GIB = 2**30


def fake(tokens: int | None, device: str = "cpu") -> Any:
    return SimpleNamespace(tokens_per_row=tokens, device=torch.device(device))


def members(count: int) -> Any:
    return SimpleNamespace(members=[None] * count)


def rows_of(backbone: Any, num_members: int) -> int:
    return automatic_rows(backbone, None, members(num_members), PROMPT)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_members", [1, 2, 3])
@pytest.mark.parametrize("tokens", [49, 1357, 4608, 100_000])
def test_the_rule_of_the_cpu(tokens: int, num_members: int) -> None:
    rows = rows_of(fake(tokens), num_members)
    pictures = rows // num_members
    assert rows == pictures * num_members
    assert pictures & (pictures - 1) == 0, "a power of two"
    assert rows <= MOST_ROWS
    assert rows * tokens <= TOKENS_PER_FORWARD or pictures == 1
    double = 2 * rows
    assert double > MOST_ROWS or double * tokens > TOKENS_PER_FORWARD, "no more would do"


def test_the_rule_for_models_that_are_at_hand() -> None:
    assert rows_of(SD3.of(build_pipeline(TINY)), 2) == MOST_ROWS
    assert rows_of(Stock.of(tiny.fresh(tiny.flux1)), 2) == 32, "a call makes one picture, so units are small"


def test_tokens_of_a_row_are_those_that_the_transformer_sees() -> None:
    backbone = QwenImage.of(tiny.fresh(tiny.qwen_image), 16, 24)
    seen: list[int] = []
    block = backbone.transformer.transformer_blocks[0]

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["hidden_states"].shape[1] + kwargs["encoder_hidden_states"].shape[1])

    block.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        backbone.velocity(backbone.noise([0]), torch.ones(1), backbone.example())
    assert seen == [backbone.tokens_per_row]


class Memory:
    """A GPU in which a forward takes `fixed + each x pictures` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: float, fixed: float, each: float) -> None:
        self.free, self.fixed, self.each, self.tried = free, fixed, each, []
        self.limit = free
        monkeypatch.setattr(rows_file, "_free_memory", lambda device: self.free)
        monkeypatch.setattr(rows_file, "_peak", self.peak)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def peak(self, backbone: Any, attachment: Any, layout: Any, prompt: Any, pictures: int) -> float:
        self.tried.append(pictures)
        if self.fixed + self.each * pictures > self.limit:
            raise torch.OutOfMemoryError("simulated")
        return self.fixed + self.each * pictures


def test_what_is_measured_fills_the_memory_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, free=40 * GIB, fixed=1 * GIB, each=1.5 * GIB)
    assert rows_of(fake(4608, "cuda"), 2) == 2 * 16, "16 pictures take 25 of 32 usable GiB; 32 would take 49"
    assert memory.tried[-1] == 16, "the answer itself was tried"
    memory.free *= 0.9
    assert rows_of(fake(4608, "cuda"), 2) == 2 * 16, "a little less memory gives the same number"
    memory.each /= 1000
    assert rows_of(fake(49, "cuda"), 2) == MOST_ROWS


def test_memory_that_was_overestimated_halves_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, free=40 * GIB, fixed=1 * GIB, each=1.5 * GIB)
    memory.limit = 10 * GIB
    assert rows_of(fake(4608, "cuda"), 1) == 4
    memory.limit = 5 * GIB
    assert rows_of(fake(4608, "cuda"), 1) == 2, "even the measurement did not fit"
    memory.limit = 0
    assert rows_of(fake(4608, "cuda"), 1) == 1, "the evaluation will say that one picture does not fit"


def test_what_is_measured_is_a_step_of_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = SD3.of(build_pipeline(TINY))
    sites = find_sites(backbone.transformer)
    layout = build_layout(sites, "gate", "cfg", 3.0)
    sizes: list[int] = []
    original = backbone.velocity
    monkeypatch.setattr(backbone, "velocity", lambda x, *rest: sizes.append(len(x)) or original(x, *rest))
    sample_once(backbone, attach(backbone.transformer, sites), layout, PROMPT, 3)
    assert sizes == [6]


@pytest.mark.usefixtures("no_plots")
def test_a_resumed_run_takes_the_rows_of_its_checkpoint(runs: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its own device would take."""
    flags = ("--model.rows_per_forward=auto", "--data.val=null")
    found = iter((4, 4, 12))
    monkeypatch.setattr(engine_file, "automatic_rows", lambda *_: next(found))
    whole = runs.fit("whole", *flags, "--trainer.max_steps=3")
    part = runs.fit("part", *flags, "--trainer.max_steps=1")
    checkpoint = part / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["calibri_lightning"]["rows_per_forward"] == 4
    resumed = runs.fit("part", *flags, "--trainer.max_steps=3", f"--ckpt_path={checkpoint}")
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()
    assert next(found) == 12, "nothing was measured again"


@pytest.mark.usefixtures("no_plots")
def test_automatic_rows_are_settled_for_every_command(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    flag = "--model.rows_per_forward=auto"
    path = runs.fit("a", flag, "--trainer.max_steps=1")
    assert "128 rows a forward" in capsys.readouterr().out
    start = f"--model.init_from={path}"
    assert runs("validate", "b", flag, start) == 0
    assert runs("test", "c", flag, start) == 0
    assert runs("predict", "d", flag, start, "--data.predict_prompts=[a red circle]") == 0


def test_a_checkpoint_of_another_balance_is_refused(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.fit("a", "--model.balance_over=2", "--trainer.max_steps=1")
    resume = f"--ckpt_path={Path(path) / 'checkpoints' / 'last.ckpt'}"
    assert runs("fit", "a", "--trainer.max_steps=2", resume) == 2
    assert "model.balance_over was 2" in capsys.readouterr().err
    runs.fit("a", "--model.balance_over=2", "--trainer.max_steps=2", resume)


def test_a_checkpoint_of_other_rows_is_refused(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.fit("a", "--model.rows_per_forward=auto", "--trainer.max_steps=1")
    resume = f"--ckpt_path={Path(path) / 'checkpoints' / 'last.ckpt'}"
    assert runs("fit", "a", "--model.rows_per_forward=6", "--trainer.max_steps=2", resume) == 2
    assert "pictures a unit (model.rows_per_forward) was 64 and is 3" in capsys.readouterr().err
