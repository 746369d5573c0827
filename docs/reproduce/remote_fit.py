"""Fits with a reward in the process and behind a server, and compares results and time.

    python docs/reproduce/remote_fit.py --out remote_fit.json

Starts `calibri_lightning serve --reward shapes` on a free port of this machine, runs the same short fit with each way
in turn, several times, and prints whether `calibration.json` has the same values to the last bit, and the ratio of the
times. A fit is a process of its own; its time is that between its first and its last training step, as its metrics
tell.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
READY = re.compile(r"ready on (\S+?):? ")


@contextmanager
def server(cores: str | None) -> Iterator[str]:
    """Serves the shapes checker.

    Args:
        cores: CPU cores of the server, as taskset takes them.

    Yields:
        Its URL.
    """
    pinned = ["taskset", "-c", cores] if cores else []
    command = [*pinned, sys.executable, "-m", "calibri_lightning", "serve", "--reward", "shapes", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = READY.search(line)
            if found:
                yield found[1].rstrip(":")
                break
        else:
            raise SystemExit("the server ended before it was ready")
    finally:
        process.terminate()
        process.wait()


def fit(folder: Path, name: str, rewards: str, steps: int, cores: str | None) -> tuple[list[float], float]:
    """Runs a fit.

    Args:
        folder: Where its run goes.
        name: Its name.
        rewards: `model.rewards` as JSON.
        steps: Training steps.
        cores: CPU cores of the fit, as taskset takes them.

    Returns:
        The values of the calibration, and seconds from the first training step to the last.
    """
    pinned = ["taskset", "-c", cores] if cores else []
    flags = [f"--trainer.default_root_dir={folder}", f"--name={name}", f"--trainer.max_steps={steps}"]
    flags += [
        "--test_after_fit=false",
        "--data.val=null",
        f"--model.rewards={rewards}",
        "--trainer.log_every_n_steps=1",
    ]
    command = [*pinned, sys.executable, "-m", "calibri_lightning", "fit", "--config", str(CONFIG), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    [run] = (folder / name).iterdir()
    events = EventAccumulator(str(run)).Reload().Scalars("train/reward_mean")
    return json.loads((run / "calibration.json").read_text())["values"], events[-1].wall_time - events[0].wall_time


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares.

    Args:
        arguments: The command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="fits of each way, in turn")
    parser.add_argument("--steps", type=int, default=6, help="generations of a fit")
    parser.add_argument("--fit_cores", help="cores of the fits, for taskset, for example 0")
    parser.add_argument("--server_cores", help="cores of the server, for example 1")
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds: dict[str, list[float]] = {"in process": [], "through a server": []}
    values = []
    with server(given.server_cores) as url, tempfile.TemporaryDirectory() as folder:
        ways = {
            "in process": '{"shapes": 1.0}',
            "through a server": json.dumps({"shapes": {"reward": "remote", "options": {"urls": [url]}}}),
        }
        for repeat in range(given.repeats):
            for way, rewards in ways.items():
                name = f"{way.replace(' ', '_')}_{repeat}"
                found, took = fit(Path(folder), name, rewards, given.steps, given.fit_cores)
                values.append(found)
                seconds[way].append(took)
                print(f"{way}: {took:.2f} s for {given.steps - 1} generations", flush=True)
    same = all(found == values[0] for found in values)
    ratio = statistics.median(seconds["through a server"]) / statistics.median(seconds["in process"])
    print(f"calibrations equal to the last bit: {'yes' if same else 'NO'}; time through a server: {ratio:.3f} times")
    if given.out:
        given.out.write_text(json.dumps({"same": same, "ratio": ratio, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
