"""The command `compare`: reads runs, draws the same prompts with each, and writes the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calibri_lightning.commandline import cleaning_up_when_terminated, exit_code
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt, check_source, read_prompts
from calibri_lightning.rewards import RewardConfig, RewardSet
from calibri_lightning.tools.compare.comparing import Setting, compare
from calibri_lightning.tools.compare.comparison import Comparison
from calibri_lightning.tools.compare.conditions import check_same_model, check_seen, notes
from calibri_lightning.tools.compare.contenders import Contender
from calibri_lightning.tools.compare.drawing import Task, draw_all
from calibri_lightning.tools.compare.options import Options, parse
from calibri_lightning.tools.compare.runs import BASE_LABEL, LabelledRun, read_runs
from calibri_lightning.tools.compare.tables import render_table
from calibri_lightning.tools.compare.writing import check_free, write_report
from calibri_lightning.tools.pictures import few_prompts

if TYPE_CHECKING:
    from calibri_lightning.backbones import Backbone


def run_compare(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: What follows the word compare.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    return exit_code(lambda: _compare(arguments))


def _compare(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    with cleaning_up_when_terminated():
        comparison = run(options, shlex.join(["python", "-m", "calibri_lightning", "compare", *arguments]))
        files = write_report(options.out, comparison)
    print(render_table(comparison))
    print(f"Report: {files[0]}")


def run(options: Options, command: str) -> Comparison:
    """Draws and scores everything; what can be refused is refused before the model is loaded.

    Args:
        options: What to compare.
        command: What was typed, for the report.

    Returns:
        The comparison.

    Raises:
        UserError: If runs, prompts, rewards or the report's folder are not usable.
    """
    check_free(options.out)
    runs = read_runs(options.runs)
    check_same_model(runs)
    trained = [run.contender(runs) for run in runs]
    check_source(options.prompts)
    prompts = read_prompts(options.prompts)[: options.limit]
    check_seen(runs, options.prompts, prompts)
    rewards = RewardSet(_rewards(options, runs[0]))
    rewards.check(prompts)
    task = _task(options, runs[0], prompts)
    backbone = load_backbone(runs[0]).to(options.device)
    drawn = draw_all(backbone, runs, rewards, task, lambda line: print(line, file=sys.stderr, flush=True))
    members = len(runs[0].calibration.members)
    setting = Setting(
        title=options.title,
        model=runs[0].calibration.model.name,
        command=command,
        prompts=tuple(prompt.text for prompt in prompts),
        headline_steps=task.headline_steps,
        reward=rewards.entries[0].reward.name,
        notes=(*notes(runs), *_few(task)),
    )
    return compare(setting, (Contender(BASE_LABEL, num_members=members), *trained), drawn.scored, drawn.gallery)


def _few(task: Task) -> list[str]:
    """Says where intervals mean little; a text that stands there several times is one prompt."""
    measured = min(len(task.prompts), task.num_diversity_prompts) if task.samples > 1 else 0
    of_diversity = few_prompts(measured, "prompts for diversity (--diversity-prompts)") if measured else []
    return few_prompts(len({prompt.text for prompt in task.prompts})) + of_diversity


def _task(options: Options, first: LabelledRun, prompts: tuple[Prompt, ...]) -> Task:
    trained = first.calibration.obtained_by.num_steps
    at = options.at or (trained if trained in options.steps else options.steps[len(options.steps) // 2])
    return Task(
        prompts,
        options.steps,
        at,
        options.samples,
        options.diversity_prompts,
        options.pictures,
        options.rows,
        options.seed,
    )


def _rewards(options: Options, first: LabelledRun) -> Mapping[str, RewardConfig]:
    """Rewards by name, with the options that the first run has for them; all of weight 1, for each is its own row."""
    configured: dict[str, Any] = {**(first.settings.model.get("rewards") or {})}
    held_out = first.settings.model.get("held_out") or {}
    configured |= held_out if isinstance(held_out, Mapping) else dict.fromkeys(held_out)
    names = options.rewards or tuple(configured)
    found = {}
    for name in names:
        given = configured.get(name)
        known = dict(given) if isinstance(given, Mapping) else {}
        kept = {key: known[key] for key in ("options", "reward", "on_failure") if known.get(key) is not None}
        found[name] = RewardConfig(1.0, **kept)
    return found


def load_backbone(run: LabelledRun) -> Backbone:
    """Loads the model of a run as its configuration says.

    Args:
        run: The run.

    Returns:
        The untouched model, on the CPU.

    Raises:
        UserError: If the configuration is of another version, or the model is not there.
    """
    from jsonargparse import ArgumentParser

    from calibri_lightning.backbones import Backbone

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    try:
        config = parser.parse_object({"backbone": run.settings.model["backbone"]})
    except Exception as error:  # its own error, or what an import raises
        raise UserError(
            f"{run.label}: model.backbone of {run.folder / 'config.yaml'} cannot be used ({error}). The run was made "
            "by another version, or its file was edited."
        ) from error
    backbone = parser.instantiate_classes(config).backbone
    assert isinstance(backbone, Backbone)
    return backbone
