"""Measures whether step sizes from an ablation help CMA-ES on the embedded model, at one budget of images.

    python docs/reproduce/seed_search.py --images 2048 --out runs/seeding

Of each seed, two fits of configs/quickstart.yaml with CMAES: one as it is, and one generation less with `sigma_from`,
whose ablation takes that generation's images. Each runs in a process of its own with one thread; finished runs are
kept, so an interrupted measurement goes on where it stopped. Writes OUT/seeding.csv and OUT/curves.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from compare_strategies import ROOT, SETTINGS, read, run

KEY = "r2"
NUM_PARTS, LEVELS = 20, ("0.75", "1.25")
QUICK = ["--model.num_grid_prompts=0", "--model.num_diversity_prompts=0", "--data.val_size=64", "--data.test_size=240"]


def ablate(seed: int, images: int, out: Path, extra: list[str]) -> Path:
    """Measures with at most so many images, unless it was done; returns the file of sensitivities."""
    folder = out / f"ablation_{seed}"
    found = folder / "sensitivity.json"
    if not found.exists():
        prompts = images // (1 + NUM_PARTS * len(LEVELS))
        command = [
            sys.executable,
            "-m",
            "calibri_lightning",
            "ablate",
            "--config",
            str(ROOT / "configs/quickstart.yaml"),
        ]
        command += ["--by", "layer", "--levels", *LEVELS, "--num_prompts", str(prompts), "--out", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, f"--seed_everything={seed}", *extra], check=True, env=environment)
    return found


def pair(seed: int, images: int, points: int, out: Path, extra: list[str]) -> dict[str, Path]:
    """Runs both fits of a seed; returns their folders."""
    generation = SETTINGS[KEY].images_per_generation
    found = ablate(seed, generation, out, extra)
    extra = [*QUICK, *extra]
    return {
        "plain": run(KEY, seed, images, points, out / "plain", extra),
        "seeded": run(
            KEY, seed, images - generation, points, out / "seeded", [*extra, f"--model.strategy.sigma_from={found}"]
        ),
    }


def main() -> None:
    """Runs all fits and prints the differences, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2048, help="images of each run, the ablation's included")
    parser.add_argument("--points", type=int, default=2, help="validations of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/seeding"))
    parser.add_argument("--extra", nargs="*", default=[], help="further options of every fit and ablation")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        pairs = list(
            pool.map(lambda s: pair(s, options.images, options.points, options.out, options.extra), options.seeds)
        )
    gains: dict[tuple[str, str], dict[str, list[float]]] = {}
    table, curves = [], []
    for seed, folders in zip(options.seeds, pairs, strict=True):
        for name, folder in folders.items():
            images, rewards, comparisons = read(folder, SETTINGS[KEY].images_per_generation)
            spent = images + (SETTINGS[KEY].images_per_generation if name == "seeded" else 0)
            curves += [[name, seed, *point] for point in zip(spent, [f"{r:.4f}" for r in rewards], strict=True)]
            for c in comparisons:
                values = [c["difference"][end] for end in ("mean", "low", "high")]
                table.append([name, seed, c["reward"], c["against"], *(f"{value:.4f}" for value in values)])
                gains.setdefault((c["reward"], c["against"]), {}).setdefault(name, []).append(values[0])
    with (options.out / "seeding.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["setting", "seed", "reward", "against", "gain", "low", "high"], *table])
    with (options.out / "curves.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["setting", "seed", "images", "validation"], *curves])
    for (reward, against), arms in gains.items():
        plain, seeded = np.array(arms["plain"]), np.array(arms["seeded"])
        change = seeded - plain
        error = change.std(ddof=1) / np.sqrt(len(change)) if len(change) > 1 else np.nan
        print(f"{reward} against {against}: plain {plain.mean():+.3f}, seeded {seeded.mean():+.3f}")
        print(
            f"  seeded minus plain {change.mean():+.3f} +- {error:.3f} s.e., better in {(change > 0).sum()}: {change}"
        )


if __name__ == "__main__":
    main()
