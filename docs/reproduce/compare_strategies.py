"""Compares search strategies on the embedded model at one budget of images.

    python docs/reproduce/compare_strategies.py --images 3072 --out runs/compare

Each run is an ordinary `fit` of configs/quickstart.yaml in a process of its own with one thread; finished runs are
kept, so an interrupted comparison goes on where it stopped. Writes OUT/strategies.csv, OUT/curves.csv and
OUT/strategies.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """A strategy with its settings."""

    label: str
    arguments: tuple[str, ...]
    images_per_generation: int


SETTINGS = {
    "official": Setting("official CMA-ES", ("CMAES", "--model.strategy.preset=official"), 256),
    "r1": Setting(
        "R1: σ0 0.15, annealed",
        ("CMAES", "--model.strategy.popsize=16", "--model.strategy.halving=[16]", "--model.strategy.sigma0=0.15"),
        256,
    ),
    "narrow": Setting("R2 with σ0 0.15", ("CMAES", "--model.strategy.sigma0=0.15"), 256),
    "r2": Setting("R2: R1 and halving, σ0 0.2 (CMAES default)", ("CMAES",), 256),
    "p2": Setting("P2: antithetic pairs (PairES)", ("PairES",), 128),
    "block": Setting("P2, a scale for each block", ("PairES", "--model.calibration.granularity=block"), 128),
    "gate": Setting("P2, a scale for each gate", ("PairES", "--model.calibration.granularity=gate"), 128),
    "raw": Setting("P2, raw member weights", ("PairES", "--model.calibration.weight_mode=raw"), 128),
}
STRATEGIES = ("official", "r1", "r2", "p2")


def run(key: str, seed: int, images: int, points: int, out: Path, extra: list[str]) -> Path:
    """Runs one fit unless its summary exists; returns its folder."""
    setting, folder = SETTINGS[key], out / f"{key}_{seed}"
    generations = images // setting.images_per_generation
    if not any(folder.glob("version_*/summary.json")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "calibri_lightning", "fit", "--config", str(ROOT / "configs/quickstart.yaml")]
        command += [f"--seed_everything={seed}", f"--name={folder.name}", f"--trainer.default_root_dir={out}"]
        command += [f"--model.strategy={setting.arguments[0]}", *setting.arguments[1:]]
        command += [f"--trainer.max_steps={generations}", f"--trainer.val_check_interval={generations // points}"]
        command += ["--model.full_num_steps=0", *extra]
        with (folder / "log.txt").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    # An interrupted run left a folder without a summary.
    (found,) = folder.glob("version_*/summary.json")
    return found.parent


def read(folder: Path, per_generation: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Held-out validation reward of the mean over images, and the differences on the test captions."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    start = [float(row["val/start"]) for row in rows if row.get("val/start")]
    mean = [float(row["val/mean"]) for row in rows if row.get("val/mean")]
    steps = [int(row["step"]) + 1 for row in rows if row.get("val/mean")]
    summary = json.loads((folder / "summary.json").read_text())
    return np.array([0, *steps]) * per_generation, np.array([*start, *mean]), summary["comparisons"]


def main() -> None:
    """Runs all fits, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3072, help="training images of each run")
    parser.add_argument("--points", type=int, default=3, help="validations of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", default=list(STRATEGIES), choices=SETTINGS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--extra", nargs="*", default=[], help="further options of every fit")
    options = parser.parse_args()
    tasks = [(key, seed) for seed in options.seeds for key in options.settings]
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(lambda t: run(*t, options.images, options.points, options.out, options.extra), tasks))
    table, points, curves = [], [], {}
    for (key, seed), folder in zip(tasks, folders, strict=True):
        images, rewards, comparisons = read(folder, SETTINGS[key].images_per_generation)
        curves.setdefault(key, []).append(rewards)
        curves[f"{key} images"] = images
        points += [[key, seed, *point] for point in zip(images, [f"{r:.4f}" for r in rewards], strict=True)]
        for c in comparisons:
            values = [f"{c['difference'][name]:.4f}" for name in ("mean", "low", "high")]
            table.append([key, seed, c["reward"], c["against"], *values])
    with (options.out / "strategies.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["setting", "seed", "reward", "against", "gain", "low", "high"], *table])
    with (options.out / "curves.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["setting", "seed", "images", "validation"], *points])
    for key in options.settings:
        for reward, against in dict.fromkeys((row[2], row[3]) for row in table if row[0] == key):
            rows = [row for row in table if row[0] == key and row[2:4] == [reward, against]]
            gains, lows = (np.array([float(row[column]) for row in rows]) for column in (4, 5))
            error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
            spread = f"{gains.mean():+.3f} +- {error:.3f} s.e., {(lows > 0).sum()}/{len(gains)} sure"
            print(f"{key:<9} {reward:<14} against {against:<14} {spread}: {gains}")
    draw(curves, options.settings, options.out / "strategies.png")


def draw(curves: dict[str, object], keys: list[str], path: Path) -> None:
    """Draws mean and standard error of the held-out reward over images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for key, colour in zip(keys, ("#888888", "#4477AA", "#228833", "#EE6677"), strict=False):
        rewards = np.array(curves[key])
        rewards = rewards - rewards[:, :1]  # seeds differ in their noise, and so in their start
        mean, error = rewards.mean(0), rewards.std(0, ddof=1) / np.sqrt(max(len(rewards), 1))
        axes.plot(curves[f"{key} images"], mean, color=colour, marker="o", ms=3, label=SETTINGS[key].label)
        axes.fill_between(curves[f"{key} images"], mean - error, mean + error, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="training images", ylabel="soft reward of the mean minus start, validation")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
