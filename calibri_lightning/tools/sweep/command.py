"""The command `sweep`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calibri_lightning.errors import UserError
from calibri_lightning.tools.study import open_source, run_command, run_study, study_parser
from calibri_lightning.tools.sweep.draw import SweepStudy

STEPS = (5, 8, 10, 15, 28)

USAGE = """usage: calibri_lightning sweep RUN [options] [--key value ...]
       calibri_lightning sweep --config FILE [options] [--key value ...]

Draws the same prompts and noise with several numbers of steps and guidances, by the model alone and by the run's
answer, and recommends the point of fewest forwards whose interval reaches the best that the model alone can do.
Stopped and run again, it goes on where it was.

  RUN                    folder of a finished run
  --steps N ...          numbers of sampling steps (default 5 8 10 15 28)
  --guidance G ...       guidance scales, as the stock pipeline counts them (default: the model's and the run's own)
  --prompts SOURCE       prompts (default: data.val of the config)
  --num_prompts N        the first N of them
  --out DIR              folder of the results (default: sweep/ in the run's folder)

Writes sweep.csv (a row for each reward and point), sweep.png and pictures.csv (a row a picture).

  python -m calibri_lightning sweep runs/quickstart/version_0 --steps 4 8 15 28 --guidance 1 3 5 --num_prompts 48

All other options are those of test; docs/ablate.md has more.
"""


def run_sweep(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: What follows the word sweep.

    Returns:
        Exit code: 0, 2 for a user's mistake, and as of `cli.run`.
    """
    return run_command(arguments, USAGE, _sweep)


def _sweep(arguments: Sequence[str]) -> int:
    parser = study_parser("sweep")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--guidance", type=float, nargs="+", default=())
    own, source = open_source("sweep", parser, arguments)
    if min(own.steps) < 1 or not all(map(math.isfinite, own.guidance)):
        raise UserError(
            f"--steps {own.steps}, --guidance {list(own.guidance)}: steps must be at least 1 and guidances finite."
        )
    guidances = sorted({float(f"{guidance:g}") for guidance in own.guidance})
    return run_study(source, SweepStudy(source.out, sorted(set(own.steps)), guidances))
