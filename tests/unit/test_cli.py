"""The command line: help, settings and where they come from, exit codes."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from tiny_runs import CMA, TinyRuns

from calibri_lightning import read_calibration
from calibri_lightning.__main__ import COMMANDS, main
from calibri_lightning.cli import CalibriCLI

BUILT_IN_REWARD = '--model.rewards={"jpeg_compressibility": 1.0}'
"""For processes of their own, which do not find the tests' modules."""


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=550, check=False
    )


def printed_config(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict:
    assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command_and_where_to_start(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for word in (*COMMANDS, "configs/quickstart.yaml"):
        assert word in out


def test_help_and_typing_errors_load_no_heavy_library() -> None:
    script = (
        "import sys; from calibri_lightning.__main__ import main;"
        "main(['--help']); main(['--version']); main(['fitt']);"
        "print(sorted({'torch', 'lightning', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    answer = python("-c", script)
    assert answer.stdout.splitlines()[-1] == "[]", answer.stdout + answer.stderr
    assert importlib.metadata.version("calibri-lightning") in answer.stdout


def test_unknown_command_suggests_the_one_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vaildate"]) == 2
    error = capsys.readouterr().err
    assert "'vaildate' is no command" in error
    assert "Did you mean 'validate'?" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_documents_our_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    own = {
        "bench": ("--popsizes", "--precision", "most rows of one forward (default: 128)", "as released)"),
        "convert": ("--model", "flux1-dev", "--granularity", "--adapter", "must not exist"),
        "serve": ("--reward", "--token-file", "(default: 127.0.0.1)", "the first GPU, or the CPU)"),
        "export": ("RUN", "--out FOLDER", "--push OWNER/NAME", "auto (default)"),
        "compare": ("RUN", "--prompts", "--rewards", "(default: comparison)"),
        "ablate": ("RUN", "--by KIND", "--of base|answer", "ablate.csv"),
        "sweep": ("RUN", "--guidance", "sweep.png", "interval reaches the best"),
    }
    ours = ("--model.init_from", "Weight of each reward", "--data.predict_prompts", "How sites share scales")
    for words in own.get(command, ours):
        assert words in out
    assert "(default: None)" not in out or command not in own


def test_defaults_flags_and_files_in_their_order(
    runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("model: {num_steps: 4, full_num_steps: 9}\n")
    config = printed_config(capsys, runs.arguments("fit", "a", "--config", str(later), "--model.num_steps=5"))
    assert config["model"]["num_steps"] == 5, "a flag wins over files"
    assert config["model"]["full_num_steps"] == 9, "a later file wins over an earlier one"
    assert config["model"]["rows_per_forward"] == 6
    expected = {
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }
    assert expected.items() <= config["trainer"].items()
    assert "seed" not in config["model"], "seed_everything is the one seed"
    assert "optimizer" not in config


def test_strategies_swap_by_one_flag_and_may_be_abbreviated(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, runs.arguments("fit", "a", *CMA))
    strategy = config["model"]["strategy"]
    assert strategy["class_path"].endswith(".CMAES")
    assert (strategy["init_args"]["popsize"], strategy["init_args"]["preset"]) == (4, "default")
    assert config["model"]["backbone"]["class_path"].endswith(".SD3")


@pytest.mark.usefixtures("no_plots")
def test_saved_config_runs_again_to_the_same_bytes(runs: TinyRuns) -> None:
    first = runs.fit("a", "--seed_everything=3", *CMA)
    saved = first / "config.yaml"
    assert yaml.safe_load(saved.read_text())["seed_everything"] == 3
    assert main(["fit", "--config", str(saved)]) == 0
    second = runs.latest("a")
    assert second != first
    assert (second / "calibration.json").read_bytes() == (first / "calibration.json").read_bytes()
    assert (second / "config.yaml").read_bytes() == saved.read_bytes()


@pytest.mark.usefixtures("no_plots")
def test_seed_everything_is_the_seed_of_the_run(runs: TinyRuns) -> None:
    found = {
        seed: read_calibration(runs.fit("a", f"--seed_everything={seed}", "--data.val=null") / "calibration.json")
        for seed in (0, 1)
    }
    assert found[1].obtained_by.seed == 1
    assert found[0].values != found[1].values


@pytest.mark.usefixtures("no_plots")
def test_own_callbacks_and_loggers_join_ours(runs: TinyRuns) -> None:
    stopping = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/reward_mean")
    own = ("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={runs.folder}/own")
    assert runs("fit", "a", *stopping, *own) == 0
    [path] = (runs.folder / "own").glob("*/version_0")
    files = {file.name for file in path.iterdir()}
    assert {"metrics.csv", "calibration.json", "config.yaml", "checkpoints"} <= files
    assert not list(path.glob("events*"))
    assert "EarlyStopping" in (path / "config.yaml").read_text()


def test_the_hook_that_protects_the_command_line_still_exists() -> None:
    """`_parse_ckpt_path` is private to Lightning: should it be renamed, checkpoints would override flags again."""
    assert "_parse_ckpt_path" in vars(LightningCLI)
    assert "_parse_ckpt_path" in vars(CalibriCLI)


def test_completion_script_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print_completion=shtab-bash"]) == 0
    assert "--trainer.max_steps" in capsys.readouterr().out


def test_exit_code_and_message_of_a_real_process(runs: TinyRuns) -> None:
    answer = python(
        "-m", "calibri_lightning", *runs.arguments("fit", "a", "--model.strategy.num_pairs=0", BUILT_IN_REWARD)
    )
    assert answer.returncode == 2
    assert "num_pairs is 0" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stderr.count("error:") == 1
