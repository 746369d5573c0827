"""Seeds of initial noise and of the noise of steps: the only sources of randomness of a picture."""

from __future__ import annotations

import hashlib

VALIDATION_STEP, TEST_STEP, PREDICT_STEP = -1, -2, -3
"""The step of a batch that is not trained on."""


def noise_seed(seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """Seed of one picture's noise: a pure function of what the picture is, not of where or when it is drawn.

    Args:
        seed: Seed of the run.
        step: Generation or training step; or the step of validation, testing or prediction.
        prompt_index: Number of the prompt in its data set.
        sample_index: Number of the picture among those of the same prompt.

    Returns:
        63 bits of a SHA-256 digest, so that neighbouring arguments give unrelated seeds.
    """
    digest = hashlib.sha256(f"calibri-noise:{seed}:{step}:{prompt_index}:{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def step_noise_seed(picture_seed: int, step: int) -> int:
    """Seed of the noise that a stochastic step adds to one picture: a pure function of the picture and the step.

    Args:
        picture_seed: Seed of the picture's initial noise, from `noise_seed`.
        step: Number of the sampling step.

    Returns:
        63 bits of a SHA-256 digest, unrelated to the seeds of initial noise.
    """
    digest = hashlib.sha256(f"calibri-step-noise:{picture_seed}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
