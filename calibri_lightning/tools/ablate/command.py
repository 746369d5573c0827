"""The command `ablate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from calibri_lightning.calibration import Granularity
from calibri_lightning.tools.ablate.conditions import check_levels
from calibri_lightning.tools.ablate.draw import Ablation
from calibri_lightning.tools.study import open_source, run_command, run_study, study_parser

LEVELS = (0.0, 0.5, 0.75, 1.25, 1.5)

USAGE = """usage: calibri_lightning ablate RUN [options] [--key value ...]
       calibri_lightning ablate --config FILE [options] [--key value ...]

Removes each part of the transformer (its output times 0) and sweeps it (times 0.5 ... 1.5), one part at a time, on the
same prompts and noise: what happens to reward and picture. All conditions of a prompt are rows of the same batches.
Stopped and run again, it goes on where it was.

  RUN                    folder of a finished run; its answer is studied
  --by KIND              one part is a block, a layer of a block, or a gate (default gate)
  --levels L ...         what the part's output is multiplied by (default 0 0.5 0.75 1.25 1.5)
  --of base|answer       study the model alone, or with the run's scales and adapter (default: answer for a RUN)
  --prompts SOURCE       prompts (default: data.val of the config)
  --num_prompts N        the first N of them
  --out DIR              folder of the results (default: ablate/ in the run's folder)

Writes ablate.csv (a row for each part, level and reward), ablate.png, levels.png, pictures.csv (a row a picture) and
sensitivity.json, from which CMA-ES can take its first steps (fit --model.strategy.sigma_from).

  python -m calibri_lightning ablate --config configs/quickstart.yaml --by layer --num_prompts 24 --out runs/ablate

All other options are those of test; docs/ablate.md has more.
"""


def run_ablate(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: What follows the word ablate.

    Returns:
        Exit code: 0, 2 for a user's mistake, and as of `cli.run`.
    """
    return run_command(arguments, USAGE, _ablate)


def _ablate(arguments: Sequence[str]) -> int:
    parser = study_parser("ablate")
    parser.add_argument("--by", choices=get_args(Granularity), default="gate")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    parser.add_argument("--of", choices=("base", "answer"))
    own, source = open_source("ablate", parser, arguments)
    levels = check_levels(own.levels)
    of_answer = own.of == "answer" or (own.of is None and source.run is not None)
    return run_study(source, Ablation(source.out, own.by, levels, of_answer))
