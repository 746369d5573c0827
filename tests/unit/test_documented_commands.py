"""Every command of README.md and docs/ is executed; the log is history, and exempt.

* Fits of full-size models: their settings are read through `--print_config`.
* What is done with the shipped model, and with runs of it, really runs, with the budgets cut as `documented_runs` says.
* `plan` of full-size models runs on networks of the released widths with three blocks.
* Launchers: their own options by torchrun's parser, ours through `--print_config`.
* `serve` runs up to listening, `bench` and the training of the shipped model up to their first work (they have tests).
* What installs, and what runs elsewhere (uv), is compared with the files that it uses.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from config_files import ROOT
from documented_runs import clear_output, configs, is_small, planned, prepare, program, reduced, said
from documents import PAGES, Shell, blocks, documented
from huggingface_hub import HfApi
from reward_servers import served

from calibri_lightning.__main__ import main
from calibri_lightning.bench import options as bench_options
from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.served import RewardScorer
from calibri_lightning.serving.protocol import ScoreRequest
from calibri_lightning.shapes import train as shapes_train

COMMANDS = documented()
OURS = ("fit", "predict", "validate", "test")
ON_RUNS = ("predict", "ablate", "sweep", "compare", "export", "convert")


def unique(*programs: str) -> list[Shell]:
    """The commands of these programs, each once."""
    found = {shell.words: shell for shell in reversed(COMMANDS) if program(shell) in programs}
    return [found[words] for words in dict.fromkeys(shell.words for shell in COMMANDS) if words in found]


def arguments(shell: Shell) -> list[str]:
    """What follows `-m calibri_lightning`, also behind a launcher."""
    at = shell.words.index("calibri_lightning")
    assert shell.words[at - 1] == "-m"
    return list(shell.words[at + 1 :])


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    prepare(folder)
    return folder


@pytest.fixture
def here(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which documented commands find what they name."""
    monkeypatch.chdir(clone)
    monkeypatch.syspath_prepend(clone)
    monkeypatch.setenv("NODE_RANK", "0")
    return clone


def check_all(shells: list[Shell], check: Callable[[Shell], Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Goes through commands and names those that failed, with what they said."""
    assert shells
    failed = []
    for shell in shells:
        code = check(shell)
        said = capsys.readouterr()
        if code:
            failed.append(f"{shell.place}: {shell.text}\n{said.err or said.out}")
    assert not failed, "\n".join(failed)


def test_settings_of_full_size_runs_are_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shells = [shell for shell in unique(*OURS, "launcher") if program(shell) == "launcher" or not is_small(shell.words)]
    check_all(shells, lambda shell: main([*arguments(shell), "--print_config"]), capsys)


def test_configurations_that_commands_name_are_shipped() -> None:
    named = {file for shell in COMMANDS for file in configs(shell.words)}
    assert {file for file in named if not (ROOT / file).is_file()} <= {"my.yaml", "reported.yaml"}


def test_plans(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_all(unique("plan"), lambda shell: main(planned(arguments(shell))), capsys)


def run(shell: Shell) -> int:
    """Runs a command with less to do; a reward's server that it asks is started."""
    words = reduced(arguments(shell))
    clear_output(words)
    url = next((found[0] for word in words if (found := re.search(r"http://127\.0\.0\.1:\d+", word))), None)
    if url is None:
        return main(words)
    with served(RewardScorer(find_reward("shapes"), "cpu")) as (real, _):
        return main([word.replace(url, real) for word in words])


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_commands_on_the_shipped_model_run(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the pages, README first: later ones use the runs that earlier ones leave."""
    hub = create_autospec(HfApi, instance=True)
    hub.whoami.return_value, hub.repo_exists.return_value = {"name": "owner"}, False
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    shells = [shell for shell in unique("fit", *ON_RUNS) if is_small(shell.words)]
    assert {program(shell) for shell in shells} == {"fit", *ON_RUNS}
    check_all(shells, run, capsys)
    assert hub.upload_folder.called == any("--push" in shell.words for shell in shells)
    for page in ("README.md", "docs/quickstart.md"):
        exec(compile(said(page, "python", "load_calibration(pipe"), page, "exec"), {})
    assert (here / "circle.png").is_file()


def test_servers_are_started_up_to_listening(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibri_lightning.serving.run.serve", lambda *_: None)
    (here / "token").write_text("0" * 48)
    # No machine of a test has as many GPUs.
    check_all(unique("serve"), lambda shell: main([re.sub(r"^cuda:\d$", "cpu", w) for w in arguments(shell)]), capsys)


def test_benchmarks_take_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    check_all(unique("bench"), lambda shell: bench_options.parse(arguments(shell)[1:]) is None, capsys)


def test_the_shipped_models_training_takes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    [shell] = unique("python -m calibri_lightning.shapes.train")
    taken: list[Any] = []
    monkeypatch.setattr(shapes_train, "train", taken.append)
    monkeypatch.setattr(sys, "argv", list(shell.words[2:]))
    shapes_train.main()
    assert (str(taken[0].out), taken[0].compile) == ("runs/shapes", True)


def test_launchers_start_as_many_processes_as_the_run_has() -> None:
    from torch.distributed.run import get_args_parser

    for shell in unique("launcher"):
        words, ours = list(shell.words), arguments(shell)
        counts = ("--trainer.devices", "--trainer.num_nodes")
        devices, nodes = (int(ours[ours.index(name) + 1]) if name in ours else 1 for name in counts)
        assert ours[ours.index("--trainer.strategy") + 1] == "ddp"
        if words[0] == "torchrun":
            words = [word.replace("$NODE_RANK", "1").replace("$MASTER_ADDR", "node0") for word in words]
            given = get_args_parser().parse_args(words[1:])
            assert (int(given.nproc_per_node), int(given.nnodes.partition(":")[0])) == (devices, nodes)
            assert (given.module, given.training_script) == (True, "calibri_lightning")
        else:
            [block] = [b for page in PAGES for b in blocks(page) if b.place == shell.place]
            slurm = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", block.text, flags=re.MULTILINE))
            assert slurm == {"nodes": str(nodes), "ntasks-per-node": str(devices), "gpus-per-node": str(devices)}


def test_what_installs_is_what_the_checks_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert "--constraint constraints.txt --editable '.[test]'" in ci
    for shell in unique("pip"):
        assert shell.words[1:5] == ("install", "-c", "constraints.txt", "-e"), shell
        extra = re.fullmatch(r"\.(?:\[(\w+)\])?", shell.words[5])
        assert extra is not None, shell
        assert extra[1] is None or extra[1] in project["optional-dependencies"], shell
    for shell in unique("python -m venv"):
        assert ". " + shell.words[3] + "/bin/activate" in {other.text for other in COMMANDS}
    for shell in unique("pytest"):
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        assert shell.words[-2:] == ("-m", "not gpu")
        assert any(marker.startswith("gpu:") for marker in markers)
    for shell in unique("bash"):
        assert subprocess.run(["bash", "-n", ROOT / shell.words[1]], check=False).returncode == 0
    assert all(shell.words == ("pre-commit", "install") for shell in unique("pre-commit"))
    assert (ROOT / ".pre-commit-config.yaml").is_file()


def test_scripts_for_uv_have_the_options() -> None:
    shared = (ROOT / "calibri_lightning" / "serving" / "options.py").read_text()
    for shell in unique("uv"):
        assert shell.words[1] == "run"
        script = (ROOT / shell.words[2]).read_text() + (ROOT / shell.words[2]).with_name("shared.py").read_text()
        for option in (word for word in shell.words if word.startswith("--")):
            assert f'"{option}"' in script + shared, (shell.place, option)


def test_a_request_by_hand_is_a_request(tmp_path: Path) -> None:
    [shell] = [shell for shell in COMMANDS if shell.words == ("python", "-")]
    made = subprocess.run([sys.executable, "-"], input=shell.stdin, capture_output=True, text=True, check=True)
    request = ScoreRequest.model_validate_json(made.stdout)
    [curl] = unique("curl")
    assert curl.words[-1].endswith("/v1/score")
    assert '"/v1/score"' in (ROOT / "calibri_lightning" / "serving" / "app.py").read_text()
    rewards = {name for serve in unique("serve") if serve.place.startswith("docs/serving") for name in serve.words}
    assert request.reward in rewards
    assert [word.strip("-") for shell in unique("openssl") for word in shell.words[2:]] == ["hex", "24"]


def scripts() -> Iterator[str]:
    for page in PAGES:
        yield from (block.text for block in blocks(page) if block.language == "bash" and block.is_script)


def test_the_papers_prompts_end_in_files_that_share_none(tmp_path: Path) -> None:
    """The block of docs/configs.md, with small lists in the place of the clone."""
    [script] = scripts()
    lists = {"train": "a\nb \nb\nc\nd\n", "val": "c\nd\ne\n\n", "val_random_crop": "d\nd\n"}
    (tmp_path / "Calibri" / "data").mkdir(parents=True)
    for name, text in lists.items():
        (tmp_path / "Calibri" / "data" / f"t2i_compbench_{name}.txt").write_text(text)
    subprocess.run(["bash", "-ec", f"git() {{ :; }}\n{script}"], cwd=tmp_path, check=True)
    made = {part: (tmp_path / "prompts" / f"{part}.txt").read_text().split() for part in ("train", "val", "test")}
    assert made == {"val": ["d"], "test": ["c", "e"], "train": ["a", "b"]}


CHECKED = {
    *OURS,
    *ON_RUNS,
    *("plan", "serve", "bench", "launcher", "python -m calibri_lightning.shapes.train"),
    *("python -m venv", ".", "pip", "pytest", "pre-commit", "bash", "uv", "curl", "openssl", "chmod", "python"),
}
"""What the tests above go through; `.`, `chmod` and `python -` beside the commands that they belong to."""


def test_no_command_is_without_a_test() -> None:
    left = [f"{shell.place}: {shell.text}" for shell in COMMANDS if program(shell) not in CHECKED]
    assert not left, "no rule of this file covers these commands; add one that can fail:\n" + "\n".join(left)
    for shell in COMMANDS:
        assert program(shell) != "python" or shell.words == ("python", "-"), f"{shell.place}: {shell.text}"
