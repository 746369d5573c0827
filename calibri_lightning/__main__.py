"""`python -m calibri_lightning`: dispatches to the commands; heavy imports wait until a command is known."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import cast


@dataclass(frozen=True)
class Command:
    """One word after the program's name.

    Attributes:
        help: What it does, in one line.
        entry: `module:function` that takes the arguments after the word and returns an exit code. None for the
            commands of Lightning's command line, which parses the word itself.
    """

    help: str
    entry: str | None = None


COMMANDS = {
    "fit": Command("search the scales; ends with a test on held-out prompts"),
    "validate": Command("score the start, and a checkpoint's answer, on the validation prompts"),
    "test": Command("compare base and calibration on the test prompts: table, summary.json, pictures"),
    "predict": Command("draw prompts with a calibration, one PNG each"),
    "compare": Command(
        "draw the same prompts with several runs: verdict, tables and one page with the pictures",
        "calibri_lightning.tools.compare.command:run_compare",
    ),
    "export": Command(
        "turn a run into files that others can use: a diffusers folder, or scales for load_calibration",
        "calibri_lightning.tools.export.command:run_export",
    ),
    "convert": Command(
        "read and write checkpoints of the official Calibri code",
        "calibri_lightning.tools.convert.command:run_convert",
    ),
    "ablate": Command(
        "remove and sweep each block, layer or gate: what it is worth to reward and picture",
        "calibri_lightning.tools.ablate.command:run_ablate",
    ),
    "sweep": Command(
        "try numbers of steps and guidances for a run, and recommend one",
        "calibri_lightning.tools.sweep.command:run_sweep",
    ),
    "plan": Command(
        "say what memory a fit will need, before anything is loaded", "calibri_lightning.planning.command:run_plan"
    ),
    "bench": Command("measure the evaluation loop on this machine", "calibri_lightning.bench.run:run"),
    "serve": Command(
        "score pictures for runs in other processes and on other machines",
        "calibri_lightning.rewards.serve_command:run_serve",
    ),
}

USAGE = f"""usage: calibri_lightning COMMAND [--config FILE] [--key value ...]

Calibrates frozen diffusion transformers: turns their ~100 scales until a reward rises.

commands:
{"".join(f"  {name:<10} {command.help}" + chr(10) for name, command in COMMANDS.items())}
start here:
  python -m calibri_lightning fit --config configs/quickstart.yaml

help on one command:      python -m calibri_lightning fit --help
the resolved settings:    python -m calibri_lightning fit --config FILE --print_config
shell completion:         python -m calibri_lightning --print_completion=shtab-bash
"""


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
    command = COMMANDS.get(arguments[0])
    if command is None and not arguments[0].startswith("--print_completion"):
        import difflib

        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"error: {arguments[0]!r} is no command; there are {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
        return 2
    # Before anything imports transformers, which warns of image processors that need torchvision; none here do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if command is not None and command.entry is not None:
        module, function = command.entry.split(":")
        run_command = cast(Callable[[Sequence[str]], int], getattr(import_module(module), function))
        return run_command(arguments[1:])
    from calibri_lightning.cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
