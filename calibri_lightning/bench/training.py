"""Training steps side by side: pictures a second, what a picture costs in forwards, and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from calibri_lightning.bench.measure import Memory, Spread, Timing, interleave, memory_of
from calibri_lightning.bench.recipes import VARIANTS, Recipe, Variant, recipes
from calibri_lightning.bench.trainee import Trainee
from calibri_lightning.bench.workbench import Workbench
from calibri_lightning.rewards import RewardSet
from calibri_lightning.shapes.captions import prompts as captions

REWARD = "jpeg_compressibility"
"""Scores all models: it differs between any two pictures, whereas a step with equal rewards would train nothing."""


@dataclass(frozen=True)
class StepResult:
    """Training steps of one recipe and variant."""

    recipe: str
    variant: Variant
    timing: Timing
    """Seconds of training steps."""
    memory: Memory | None
    """None where it cannot be known."""
    images_per_second: float
    """Pictures that were made, scored and trained on, a second, at the median time."""
    forwards_per_image: float
    """Rows that passed the transformer, forwards and backwards, over pictures: counted at the transformer."""
    spent_per_image: float
    """The same as the strategy adds it to the budget of a run."""
    on_paper: int
    """The same as derived from the recipe."""
    ratio_deviation: float
    """Largest distance of a probability ratio from 1, over all steps; each is on-policy, so all of it is numerical."""


@dataclass(frozen=True)
class PassResult:
    """A forward with its backward against a forward, of one variant, without guidance."""

    variant: Variant
    rows: int
    """Rows of a forward."""
    forward_seconds: float
    """Median of a forward without gradients."""
    with_backward: Spread
    """Time of a forward with its backward over that of a forward; budgets count 2."""


def measure_training(bench: Workbench) -> tuple[tuple[StepResult, ...], tuple[PassResult, ...]]:
    """Times training steps of all recipes and variants, interleaved; then single passes; then watches memory.

    Args:
        bench: Model and options.

    Returns:
        Steps and passes.

    Raises:
        UserError: If the model's pictures are broken, so that no step can be taken.
    """
    options, device = bench.options, bench.options.device
    setting = options.settings[0]
    fast, classic = recipes(options.members == "cfg")
    pairs = [(recipe, variant) for recipe in (fast, classic) for variant in VARIANTS]
    with setting.active(device):
        trainees = {pair: _trainee(bench, *pair) for pair in pairs}
        steps = {_name(pair): trainee.train for pair, trainee in trainees.items()}
        timings = interleave(steps, options.repeats, device)
        passes = _measure_passes(bench, [trainees[fast, variant] for variant in VARIANTS])
        # Memory in a pass of its own: watching it, the first pass of a loop would be slower.
        memory = {pair: memory_of(trainee.train, device) for pair, trainee in trainees.items()}
    results = [_result(pair, trainees[pair], timings[_name(pair)], memory[pair]) for pair in pairs]
    return tuple(results), passes


def _name(pair: tuple[Recipe, Variant]) -> str:
    return f"{pair[0].name}, {pair[1].name}"


def _trainee(bench: Workbench, recipe: Recipe, variant: Variant) -> Trainee:
    options, known = bench.options, captions("train")
    strategy = recipe.strategy(variant, options.num_steps, options.num_groups, options.group_size)
    prompts = [known[number % len(known)] for number in range(options.num_groups)]
    rewards = RewardSet({REWARD: 1.0})
    return Trainee(bench.plain(options.settings[0]), recipe.guided, strategy, rewards, options.rows, prompts)


def _result(pair: tuple[Recipe, Variant], trainee: Trainee, timing: Timing, memory: Memory | None) -> StepResult:
    recipe, variant = pair
    per_step = trainee.strategy.settings.images_per_step
    num_images = per_step * trainee.num_steps_taken
    return StepResult(
        recipe=recipe.name,
        variant=variant,
        timing=timing,
        memory=memory,
        images_per_second=per_step / timing.median,
        forwards_per_image=trainee.passed_rows / num_images,
        spent_per_image=trainee.spent_forwards / num_images,
        on_paper=trainee.strategy.forwards_per_picture(trainee.module),
        ratio_deviation=max(trainee.logged["train/ratio_deviation_max"]),
    )


def _measure_passes(bench: Workbench, trainees: list[Trainee]) -> tuple[PassResult, ...]:
    """Times single passes of a trainee of each variant."""
    functions: dict[str, Callable[[], object]] = {}
    for variant, trainee in zip(VARIANTS, trainees, strict=True):
        functions[f"{variant.name} forward"], functions[f"{variant.name} both"] = trainee.passes()
    timings = interleave(functions, bench.options.forward_repeats, bench.options.device)
    results = []
    for variant, trainee in zip(VARIANTS, trainees, strict=True):
        forward, both = timings[f"{variant.name} forward"], timings[f"{variant.name} both"]
        rows = min(trainee.engine.evaluator.cells_per_unit, trainee.strategy.settings.group_size)
        results.append(PassResult(variant, rows, forward.median, forward.speedup_over(both)))
    return tuple(results)
