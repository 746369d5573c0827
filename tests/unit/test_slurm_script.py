"""The SLURM script starts what it says, and puts back into the queue what would go on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from config_files import ROOT

from calibri_lightning.__main__ import main
from calibri_lightning.launch.watch import EXIT_CODE

SCRIPT = ROOT / "docs" / "slurm" / "fit.sbatch"
CONFIG = "configs/sd35_medium/flow_grpo.yaml"
FAKE = '#!/bin/bash\nprintf "%s\\n" "$@" > "$FAKES/{name}.words"\nexit ${{{name}_code:-0}}\n'


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        *((0, 0, False), (1, 0, False), (2, 0, False), (143, 0, False), (137, 9, True), (137, 10, False)),
        *((138, 0, True), (138, 99, True), (EXIT_CODE, 0, True), (EXIT_CODE, 10, False)),
    ],
)
def test_what_was_cut_off_is_queued_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, restarts: int, again: bool
) -> None:
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(FAKE.format(name=name))
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "FAKES": str(tmp_path),
        "srun_code": str(code),
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_JOB_NUM_NODES": "2",
    }
    words = ["bash", str(SCRIPT), CONFIG, "--name", "my run"]
    assert subprocess.run(words, env=environment, check=False).returncode == code
    queued = tmp_path / "scontrol.words"
    assert queued.exists() == again
    if again:
        assert queued.read_text().split() == ["requeue", "77"]
    given = (tmp_path / "srun.words").read_text().splitlines()
    at = given.index("calibri_lightning")
    assert given[:at] == ["--kill-on-bad-exit=1", "python", "-m"]
    assert given[-2:] == ["--name", "my run"]
    text = SCRIPT.read_text()
    for option in ("--nodes=2", "--ntasks-per-node=8", "--signal=SIGUSR1@120", "--requeue"):
        assert f"#SBATCH {option}\n" in text
    assert given[given.index("--trainer.num_nodes") + 1] == "2"
    assert main([*given[at + 1 :], "--print_config"]) == 0
    assert "ckpt_path: auto" in capsys.readouterr().out
