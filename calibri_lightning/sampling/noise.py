"""Seeds of initial noise, of the noise of steps and of training: the only sources of randomness of a picture."""

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
    return _seed(f"calibri-noise:{seed}:{step}:{prompt_index}:{sample_index}")


def step_noise_seed(picture_seed: int, step: int) -> int:
    """Seed of the noise that a stochastic step adds to one picture: a pure function of the picture and the step.

    Args:
        picture_seed: Seed of the picture's initial noise, from `noise_seed`.
        step: Number of the sampling step.

    Returns:
        63 bits of a SHA-256 digest, unrelated to the seeds of initial noise.
    """
    return _seed(f"calibri-step-noise:{picture_seed}:{step}")


def forward_noise_seed(picture_seed: int, number: int) -> int:
    """Seed of the noise with which a finished picture is noised again, to be trained on.

    Args:
        picture_seed: Seed of the picture's initial noise, from `noise_seed`.
        number: Which of the noise levels that the picture is trained on.

    Returns:
        63 bits of a SHA-256 digest, unrelated to all other seeds.
    """
    return _seed(f"calibri-forward-noise:{picture_seed}:{number}")


def levels_seed(picture_seed: int) -> int:
    """Seed of the choice and the order of the noise levels that one picture is trained on.

    Args:
        picture_seed: Seed of the picture's initial noise, from `noise_seed`.

    Returns:
        63 bits of a SHA-256 digest, unrelated to all other seeds.
    """
    return _seed(f"calibri-levels:{picture_seed}")


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
