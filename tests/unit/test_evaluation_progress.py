"""The progress line: its text, and how it is printed inside a real training loop."""

from __future__ import annotations

import dataclasses
import io
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from quiet_trainer import quiet_trainer

from calibri_lightning.evaluation import GenerationStats, format_duration, format_progress
from calibri_lightning.strategies.progress import ProgressLine

STATS = GenerationStats(
    generation=12,
    total=200,
    mean=0.6123,
    best=0.7012,
    pace=0.1478,
    images=3072,
    images_per_second=83.44,
    eta_seconds=151.2,
    reward_name="shapes",
)


def test_line_exactly():
    assert format_progress(STATS) == (
        "generation  12/200 · shapes mean 0.612 best 0.701 · σ 0.148 · 3,072 images · 83.4 images/s · ETA 2:31"
    )
    assert format_progress(STATS, ascii_only=True) == (
        "generation  12/200 | shapes mean 0.612 best 0.701 | sigma 0.148 | 3,072 images | 83.4 images/s | ETA 2:31"
    )


def test_unknown_total_and_end():
    stats = dataclasses.replace(STATS, total=None, eta_seconds=None)
    assert format_progress(stats) == (
        "generation 12 · shapes mean 0.612 best 0.701 · σ 0.148 · 3,072 images · 83.4 images/s"
    )


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (100, "generation  12/200 · shapes mean 0.612 best 0.701 · σ 0.148 · 3,072 images · ETA 2:31"),
        (80, "generation  12/200 · shapes mean 0.612 best 0.701 · 3,072 images · ETA 2:31"),
        (70, "generation  12/200 · shapes mean 0.612 best 0.701 · ETA 2:31"),
        (50, "generation  12/200 · shapes mean 0.612 · ETA 2:31"),
        (20, "generation  12/200 ·"),
    ],
)
def test_narrow_terminals_lose_the_least_important_first(width, expected):
    assert format_progress(STATS, width) == expected
    assert len(expected) <= width


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (-0.25, "-0.250"),
        (23.456, "23.46"),
        (-128.41, "-128.4"),
        (12345.6, "12,346"),
        (2.5e-5, "2.50e-05"),
        (float("nan"), "n/a"),
    ],
)
def test_scores_of_any_size(value, text):
    assert f"mean {text} best" in format_progress(dataclasses.replace(STATS, mean=value))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (151, "2:31"),
        (3600, "1:00:00"),
        (86399, "23:59:59"),
        (90061, "1d 01:01:01"),
        (-3, "0:00"),
        (float("inf"), "n/a"),
        (float("nan"), "n/a"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class Search(LightningModule):
    """Finishes a generation a batch, without any optimiser."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.last_generation: GenerationStats | None = None
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx: int) -> None:
        if batch_idx == self.fail_at:
            raise RuntimeError("broken")
        self.last_generation = dataclasses.replace(STATS, generation=batch_idx + 1, total=None, eta_seconds=None)

    def configure_optimizers(self) -> None:
        return None

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(5))


def fit(callback: ProgressLine, module: Search | None = None) -> None:
    quiet_trainer(None, callback, max_epochs=1).fit(module or Search())


def line(generation: int) -> str:
    stats = dataclasses.replace(STATS, generation=generation, total=None, eta_seconds=None)
    return format_progress(stats)


def test_log_files_get_plain_lines():
    out = io.StringIO()
    fit(ProgressLine(seconds_between_lines=0.0, stream=out))
    assert out.getvalue().splitlines() == [line(i) for i in range(1, 6)]
    assert "\r" not in out.getvalue()


def test_log_files_are_not_flooded_but_get_the_first_and_the_last():
    out = io.StringIO()
    now = iter(range(0, 1000, 4))  # every look at the clock is four seconds later
    fit(ProgressLine(seconds_between_lines=10.0, stream=out, clock=lambda: next(now)))
    lines = out.getvalue().splitlines()
    assert lines[0] == line(1)
    assert lines[-1] == line(5)
    assert 2 < len(lines) < 5
    assert len(set(lines)) == len(lines)


def test_terminals_get_one_updating_line(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((120, 40)))
    out = Terminal()
    fit(ProgressLine(stream=out))
    text = out.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text[:-1].split("\r") == ["", *(line(i) for i in range(1, 6))]


def test_shorter_lines_cover_longer_ones(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((60, 40)))
    out = Terminal()
    callback = ProgressLine(stream=out)
    module, trainer = Search(), quiet_trainer(None)
    for name in ("a_rather_long_name", "b"):
        module.last_generation = dataclasses.replace(STATS, reward_name=name)
        callback.on_train_batch_end(trainer, module, None, None, 0)
    _, first, second = out.getvalue().split("\r")
    assert len(first) <= len(second) <= 59
    assert "b mean" in second


def test_an_error_begins_on_its_own_line():
    out = Terminal()
    with pytest.raises(RuntimeError, match="broken"):
        fit(ProgressLine(stream=out), Search(fail_at=2))
    assert out.getvalue().endswith("\n")
    assert out.getvalue().count("\n") == 1


def test_other_ranks_are_silent():
    out = io.StringIO()
    trainer = SimpleNamespace(is_global_zero=False)
    module = Search()
    module.last_generation = STATS
    ProgressLine(stream=out).on_train_batch_end(trainer, module, None, None, 0)
    assert out.getvalue() == ""


def test_streams_without_greek_letters_get_ascii():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    fit(ProgressLine(seconds_between_lines=0.0, stream=out))
    assert b"sigma 0.148" in raw.getvalue()
