"""Runs of the whole program on a tiny model, through its own command line."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from calibri_lightning.__main__ import main

Capture = pytest.CaptureFixture[str]

TRAIN = ("a red circle", "a red square", "a red triangle", "a blue circle", "a blue square", "a green circle")
VAL = ("two red circles", "two red squares", "two green circles")
TEST = ("three red circles", "three red squares", "three green circles")

CONFIG = """
seed_everything: 0
name: t
test_after_fit: false
model:
  backbone: {{class_path: SD3, init_args: {{pretrained: {folder}/model}}}}
  calibration: {{granularity: layer, members: cfg, guidance_scale: 3.0, weight_mode: guidance}}
  rewards: {{"tiny_rewards:redness": 1.0}}
  strategy: {{class_path: PairES, init_args: {{num_pairs: 2, prompts_per_pair: 2}}}}
  num_steps: 2
  full_num_steps: 3
  rows_per_forward: 6
  num_grid_prompts: 2
  num_diversity_prompts: 2
data: {{train: {folder}/train.txt, val: {folder}/val.txt, test: {folder}/test.txt, eval_batch_size: 2}}
trainer: {{accelerator: cpu, devices: 1, max_steps: 2, val_check_interval: 1}}
"""

PAIRS: tuple[str, ...] = ()
"""PairES as configured."""
CMA = ("--model.strategy=CMAES", "--model.strategy.popsize=4", "--model.strategy.bucket_size=4")
"""CMA-ES with its halving rounds, as small as they get."""
OFFICIAL = ("--model.strategy=CMAES", "--model.strategy.preset=official", "--model.strategy.bucket_size=2")
"""The published settings with a small bucket."""


@dataclass(frozen=True)
class TinyRuns:
    """Runs commands; every run has a folder of its own under `folder`."""

    folder: Path
    config: Path

    @classmethod
    def make(cls, shared: Path, folder: Path) -> TinyRuns:
        """Uses the model and the prompts in `shared`."""
        return cls(folder, shared / "config.yaml")

    def arguments(self, command: str, name: str, *extra: str) -> list[str]:
        root = f"--trainer.default_root_dir={self.folder}"
        return [command, "--config", str(self.config), root, f"--name={name}", *extra]

    def __call__(self, command: str, name: str, *extra: str) -> int:
        return main(self.arguments(command, name, *extra))

    def fit(self, name: str, *extra: str) -> Path:
        """Runs a fit that has to succeed; its folder."""
        assert self("fit", name, *extra) == 0
        return self.latest(name)

    def latest(self, name: str) -> Path:
        return max((self.folder / name).glob("version_*"), key=lambda path: int(path.name.split("_")[1]))


def prepare(folder: Path) -> None:
    """Saves the tiny model, the prompts and the configuration."""
    from calibri_lightning.shapes.pipeline import TINY, build_pipeline

    build_pipeline(TINY).save_pretrained(folder / "model")
    for name, prompts in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))


def refused(runs: TinyRuns, capsys: Capture, *flags: str, command: str = "fit", worked: bool = False) -> str:
    """Runs a command that has to be refused; the message."""
    capsys.readouterr()
    assert runs(command, "bad", *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1, captured.err
    assert "Traceback" not in captured.err
    assert "usage:" not in captured.err
    assert ("Calibrating" in captured.out) <= worked, "refused before the run begins"
    assert "generation 1" not in captured.out
    return next(line for line in captured.err.splitlines() if line.startswith("error:"))


def forked(
    arguments: list[list[str]], environments: list[Mapping[str, str]], log: Path, stopped: int | None = None
) -> list[int | None]:
    """Runs the program once for each environment, at the same time, in forked processes that may kill themselves.

    A fork has imported everything already, which a fresh process would take ten seconds for.

    Args:
        arguments: Arguments of each process.
        environments: Added to the environment of each.
        log: Where their output goes.
        stopped: The process that stops itself (SIGSTOP); it is killed when the others have ended.

    Returns:
        Exit codes; -9 after SIGKILL.
    """
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_child, args=(words, dict(environment), log))
        for words, environment in zip(arguments, environments, strict=True)
    ]
    for process in processes:
        process.start()
    for process in sorted(processes, key=lambda process: stopped is not None and process is processes[stopped]):
        if stopped is not None and process is processes[stopped]:
            process.kill()
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"a process hangs; its output: {log.read_text()}")
    return [process.exitcode for process in processes]


def _child(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("a") as stream, redirect_stdout(stream), redirect_stderr(stream):
        code = main(arguments)
    sys.exit(code)


def rank_environments(world_size: int) -> list[Mapping[str, str]]:
    """What a launcher tells the ranks of a run on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    return [shared | {"LOCAL_RANK": str(rank)} for rank in range(world_size)]
