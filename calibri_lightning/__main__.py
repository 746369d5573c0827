"""`python -m calibri_lightning`: dispatches to the commands; heavy imports wait until a command is known."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

USAGE = """usage: calibri_lightning COMMAND [--config FILE] [--key value ...]

Calibrates frozen diffusion transformers: turns their ~100 scales until a reward rises.

commands:
  fit        search the scales; ends with a test on held-out prompts
  validate   score the start, and a checkpoint's answer, on the validation prompts
  test       compare base and calibration on the test prompts: table, summary.json, pictures
  predict    draw prompts with a calibration, one PNG each
  plan       say what memory a fit will need, before anything is loaded
  bench      measure the evaluation loop on this machine
  serve      score pictures for runs in other processes and on other machines

start here:
  python -m calibri_lightning fit --config configs/quickstart.yaml

help on one command:      python -m calibri_lightning fit --help
the resolved settings:    python -m calibri_lightning fit --config FILE --print_config
shell completion:         python -m calibri_lightning --print_completion=shtab-bash
"""

COMMANDS = ("fit", "validate", "test", "predict", "plan", "bench", "serve")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 when interrupted, 143 when terminated.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("calibri-lightning"))
        return 0
    if arguments[0] not in COMMANDS and not arguments[0].startswith("--print_completion"):
        import difflib

        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"error: {arguments[0]!r} is no command; there are {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
        return 2
    # Before anything imports transformers, which warns of image processors that need torchvision; none here do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if arguments[0] == "bench":
        from calibri_lightning.bench.run import run as run_bench

        return run_bench(arguments[1:])
    if arguments[0] == "plan":
        from calibri_lightning.planning.command import run_plan

        return run_plan(arguments[1:])
    if arguments[0] == "serve":
        from calibri_lightning.rewards.serve_command import run_serve

        return run_serve(arguments[1:])
    from calibri_lightning.cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
