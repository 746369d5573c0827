"""The embedded model draws as well as the README says, with room left in both directions."""

from __future__ import annotations

import numpy as np
import pytest

from calibri_lightning import SD3
from calibri_lightning.calibration import attach, build_layout, find_sites
from calibri_lightning.evaluation.bootstrap import paired_interval
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.noise import TEST_STEP, noise_seed
from calibri_lightning.shapes.captions import prompts

GUIDANCE = 3.0
"""Where the configurations start."""
FEW, FULL = 6, 28
PROMPTS = prompts("test")[:192]


@pytest.fixture(scope="module")
def strict() -> dict[int, np.ndarray]:
    backbone = SD3("shapes")
    sites = find_sites(backbone.transformer)
    layout = build_layout(sites, "gate", "cfg", GUIDANCE, "guidance")
    evaluator = Evaluator(backbone, attach(backbone.transformer, sites), layout, RewardSet({"shapes": 1.0}), 128)
    seeds = [noise_seed(0, TEST_STEP, prompt.index, 0) for prompt in PROMPTS]
    answers = {steps: evaluator.evaluate(layout.start[None], PROMPTS, seeds, steps) for steps in (FEW, FULL)}
    return {steps: answer.per_reward["shapes_strict"][0] for steps, answer in answers.items()}


@pytest.mark.slow
def test_half_to_four_fifths_of_the_held_out_captions_are_right_at_full_cost(strict: dict[int, np.ndarray]) -> None:
    assert 0.45 <= strict[FULL].mean() <= 0.80


@pytest.mark.slow
def test_few_steps_are_clearly_worse(strict: dict[int, np.ndarray]) -> None:
    assert paired_interval(strict[FULL], strict[FEW]).low > 0
