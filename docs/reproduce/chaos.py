"""Kills ranks of fits on the embedded model, over and over, and compares what they deliver with undisturbed fits.

    python docs/reproduce/chaos.py --kills 50 --seed 0 --out runs/chaos

Fits of CMA-ES and of Flow-GRPO (LoRA and scales) run on two ranks under `torchrun --max-restarts`. A plan, drawn from
the seed, says which rank kills itself (SIGKILL) in which stage: while it asks for candidates, draws (evaluate),
exchanges rewards (gather), tells the search or steps the optimiser, has half-written a checkpoint, or validates; or at
a random moment, wherever it is. torchrun starts all ranks again, and they go on by themselves. Each fit must end, and
with the bytes of the undisturbed one. Writes OUT/chaos.json: kills survived and tried, by stage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from calibri_lightning import checkpoint

ROOT = Path(__file__).parents[2]
PLAN, DONE = "CHAOS_PLAN", "CHAOS_DONE"
"""Environment variables: the planned kills (JSON), and those that took place (a line each)."""
STAGES = ("ask", "evaluate", "gather", "tell", "save", "validate", "any")
SHARED = (
    *("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.val_check_interval=2", "--data.val_size=8"),
    *("--test_after_fit=false", "--model.num_steps=3", "--trainer.max_steps=8", "--model.rows_per_forward=8"),
)
FITS = {
    "cma_es": (
        *("--config", str(ROOT / "configs/shapes/cma_es.yaml"), *SHARED),
        *("--model.strategy.popsize=6", "--model.strategy.bucket_size=4"),
    ),
    "flow_grpo": (
        *("--config", str(ROOT / "configs/shapes/flow_grpo_lora.yaml"), *SHARED),
        *("--model.strategy.train=both", "--model.strategy.num_groups=2", "--model.strategy.group_size=6"),
        *("--model.strategy.pictures_per_unit=4", "--model.strategy.window.size=2", "--model.strategy.window.last=2"),
    ),
}


@dataclass(frozen=True)
class Kill:
    """A planned kill."""

    stage: str
    """One of STAGES."""
    rank: int
    """Who kills itself."""
    count: int
    """At which visit of that stage since the last start; for "any", milliseconds after the training began."""


def draw_plan(seed: int, kills: int) -> list[Kill]:
    """Draws so many kills; every stage comes equally often, in random order."""
    source = random.Random(seed)
    stages = [STAGES[i % len(STAGES)] for i in range(kills)]
    source.shuffle(stages)
    # Rank 0 alone tells, asks and saves.
    alone = ("ask", "save")
    counts = {"evaluate": 6, "gather": 6, "any": 2500}
    return [
        Kill(stage, 0 if stage in alone else source.randrange(2), 1 + source.randrange(counts.get(stage, 2)))
        for stage in stages
    ]


class Killer(Callback):
    """Carries out the next planned kill, if it is this rank's."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lies in wait."""
        plan = [Kill(**kill) for kill in json.loads(Path(os.environ[PLAN]).read_text())]
        done = Path(os.environ[DONE])
        number = len(done.read_text().splitlines()) if done.exists() else 0
        if number >= len(plan) or plan[number].rank != trainer.global_rank:
            return
        kill, strategy = plan[number], pl_module.strategy
        visits = 0

        def die() -> None:
            with done.open("a") as file:
                file.write(json.dumps(asdict(kill) | {"step": trainer.global_step}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.kill(os.getpid(), signal.SIGKILL)

        def visit(*_: Any) -> None:
            nonlocal visits
            visits += 1
            if visits == kill.count:
                die()

        if kill.stage == "any":
            timer = threading.Timer(kill.count / 1000, die)
            timer.daemon = True
            timer.start()
        else:
            self._lie_in_wait(kill.stage, visit, pl_module, strategy)

    def _lie_in_wait(self, stage: str, visit: Callable[..., None], module: Any, strategy: Any) -> None:
        evolves = hasattr(strategy, "_tell")
        if stage == "evaluate":
            _before(module.pulse, "beat", visit)
        elif stage == "gather":
            _before(module, "gather", visit)
        elif stage == "validate":
            _before(module, "validation_step", visit)
        elif stage == "ask":
            _before(strategy, "on_train_batch_start", visit)
        elif stage == "tell":
            # Without a search: between two optimiser steps, or before the only one.
            _before(*((strategy, "on_train_batch_end") if evolves else (strategy._gradients, "step")), visit)
        elif stage == "save":
            replacing = checkpoint.replacing

            # Half of the file is there.
            @wraps(replacing)
            def half(path: Path) -> Any:
                if path.name == checkpoint.LAST:
                    path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(b"half")
                    visit()
                return replacing(path)

            checkpoint.replacing = half  # type: ignore[assignment]


def _before(owner: Any, name: str, visit: Callable[..., None]) -> None:
    """Lets a method of an object be announced."""
    method = getattr(owner, name)

    @wraps(method)
    def announced(*arguments: Any, **named: Any) -> Any:
        visit()
        return method(*arguments, **named)

    object.__setattr__(owner, name, announced)


def fit(name: str, words: Sequence[str], out: Path, restarts: int, environment: dict[str, str]) -> tuple[int, Path]:
    """Runs a fit to its end; exit code of torchrun, and the folder of its last attempt."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, f"--max-restarts={restarts}", "-m", "calibri_lightning", "fit", *words]
    command += [f"--trainer.default_root_dir={out}", f"--name={name}"]
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    known = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    with (out / f"{name}.log").open("w") as log:
        code = subprocess.run(command, env=known, stdout=log, stderr=log, check=False).returncode
    attempts = sorted((out / name).glob("version_*"), key=lambda folder: int(folder.name.rpartition("_")[2]))
    return code, attempts[-1] if attempts else out / name


def delivered(folder: Path) -> dict[str, bytes]:
    """What a fit delivers."""
    names = ("calibration.json", "adapter/adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def rounds(plan: list[Kill], each: int) -> Iterator[tuple[str, list[Kill]]]:
    """Shares the kills out among fits, whose methods take turns."""
    for number, start in enumerate(range(0, len(plan), each)):
        yield list(FITS)[number % len(FITS)], plan[start : start + each]


def main() -> int:
    """Runs all fits; 0 if every one survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--each", type=int, default=5, help="kills of one fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--extra", nargs="*", default=[], help="further options of every fit")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    expected: dict[str, dict[str, bytes]] = {}
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    started = time.monotonic()
    for number, (method, plan) in enumerate(rounds(draw_plan(options.seed, options.kills), options.each)):
        words = [*FITS[method], *options.extra]
        if method not in expected:
            code, folder = fit(f"{method}_whole", words, options.out, 0, {})
            expected[method] = delivered(folder)
            if code or not expected[method]:
                print(f"the undisturbed fit failed: {options.out / f'{method}_whole.log'}")
                return 1
        name = f"{method}_{number}"
        files = {PLAN: options.out / f"{name}.plan.json", DONE: options.out / f"{name}.done.jsonl"}
        files[PLAN].write_text(json.dumps([asdict(kill) for kill in plan]))
        places = {variable: str(file) for variable, file in files.items()}
        code, folder = fit(name, [*words, "--trainer.callbacks+=chaos.Killer"], options.out, len(plan), places)
        killed = [json.loads(line) for line in files[DONE].read_text().splitlines()] if files[DONE].exists() else []
        same = code == 0 and delivered(folder) == expected[method]
        tried.update(kill["stage"] for kill in killed)
        survived.update(kill["stage"] for kill in killed if same)
        seconds = time.monotonic() - started
        print(
            f"{seconds:6.0f} s  {name}: {len(killed)} kills, {'the same answer' if same else 'ANOTHER ANSWER'}",
            flush=True,
        )
    report = {
        "seed": options.seed,
        "kills": {stage: {"tried": tried[stage], "survived": survived[stage]} for stage in STAGES},
        "tried": tried.total(),
        "survived": survived.total(),
    }
    (options.out / "chaos.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"survived {survived.total()} of {tried.total()} kills: {options.out / 'chaos.json'}")
    return 0 if survived == tried and tried.total() else 1


if __name__ == "__main__":
    sys.exit(main())
