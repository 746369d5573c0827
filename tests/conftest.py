"""What every test shares: no network, one thread, and global state put back afterwards."""

from __future__ import annotations

import os

# Before any test imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from hypothesis import settings

# The same examples in every run, nothing kept between runs, and no test that fails because a machine is slow.
settings.register_profile("repository", derandomize=True, database=None, deadline=None)
settings.load_profile("repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restore_global_state() -> Iterator[None]:
    environment = dict(os.environ)
    dtype = torch.get_default_dtype()
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Fail the test when it draws from a global random number generator."""
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    yield
    assert random.getstate() == before[0], "the global generator of `random` was used"
    np.testing.assert_equal(np.random.get_state(legacy=False), before[1], "numpy's global generator was used")
    assert torch.equal(torch.get_rng_state(), before[2]), "torch's global generator was used"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny saved pipeline, prompts and a configuration; shared, so never written to."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_runs.prepare(folder)
    return folder


@pytest.fixture
def runs(tiny_folder: Path, tmp_path: Path) -> tiny_runs.TinyRuns:
    """Runs the whole program on the tiny model."""
    return tiny_runs.TinyRuns.make(tiny_folder, tmp_path / "runs")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots at the end of a fit, half of a tiny run's time; they have tests of their own."""
    for name in ("plot_scales", "plot_convergence"):
        monkeypatch.setattr(f"calibri_lightning.report.{name}", lambda *_: None)
