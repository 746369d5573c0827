"""How strongly each scale acts, as `ablate` measured it, and the first step sizes of a search that follow from it.

On a quadratic model of the reward with Hessian -H, sampling with the covariance H^-1 makes the search that of an
isotropic function (Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, section 0.4). Of the covariance
only the diagonal can be set before the search, so that a coordinate's step is proportional to 1 / sqrt(H_ii).

The curvature of the mean reward is lost in noise at the few prompts that a study can afford. What pictures do is not:
if the reward falls with the square of the picture's distance from a good one, H_ii is, in the Gauss-Newton
approximation, proportional to the square of how far the picture moves for a unit of the scale, and the step to 1 over
that distance.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from torch import nn

from calibri_lightning.arrays import Floats
from calibri_lightning.atomic import replacing
from calibri_lightning.calibration import Granularity, Layout, ModelFingerprint, fingerprint
from calibri_lightning.errors import UserError

FORMAT, FORMAT_VERSION = "calibri_lightning.sensitivity", 1
MOST = 3.0
"""Step sizes are at most this many times larger or smaller than without a measurement, which is of one point alone."""
_DECIMALS = 6
"""Of a factor: the last bits of logarithms differ among processors, and a resumed search must find it unchanged."""


@dataclass(frozen=True)
class Sensitivity:
    """How far a picture moves for a unit of each scale."""

    model: ModelFingerprint
    """What was measured."""
    granularity: Granularity
    """What shared a scale."""
    num_steps: int
    """Sampling steps; for people, not compared."""
    num_prompts: int
    """Prompts that it is a mean over; for people, not compared."""
    distances: Mapping[str, float]
    """By `Layout.scale_names`: root mean square difference over the pixels, 0 to 1, divided by the change of scale."""


def write_sensitivity(path: Path, found: Sensitivity) -> None:
    """Writes a measurement, whole or not at all.

    Args:
        path: The file; its folder exists.
        found: The measurement.
    """
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(found)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sensitivity(path: str | Path) -> Sensitivity:
    """Reads and checks a measurement.

    Args:
        path: A sensitivity.json that `ablate` wrote.

    Returns:
        The measurement.

    Raises:
        UserError: If there is no such file, or it is none, of another version, or edited.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise UserError(
            f"sigma_from is {path}, which cannot be read: {reason}. Give the sensitivity.json that ablate wrote."
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"sigma_from is {path}, which is no {FORMAT}. Give the sensitivity.json that ablate wrote.")
    if document.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {document.get('format_version')!r}; this calibri_lightning reads version "
            f"{FORMAT_VERSION}. Run ablate again."
        )
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} was edited or cut ({error}). Run ablate again, or restore the file.") from error


def _parse(document: Mapping[str, Any]) -> Sensitivity:
    distances = {str(name): float(value) for name, value in dict(document["distances"]).items()}
    bad = [name for name, value in distances.items() if not (math.isfinite(value) and value >= 0)]
    if bad or not any(distances.values()):
        raise ValueError(f"the distance of {bad[0]} is no number from 0 up" if bad else "it has no distance above 0")
    return Sensitivity(
        ModelFingerprint(**document["model"]),
        document["granularity"],
        int(document["num_steps"]),
        int(document["num_prompts"]),
        distances,
    )


def step_factors(distances: Floats) -> Floats:
    """Turns sensitivities into relative step sizes: proportional to 1 / distance, of geometric mean 1, within limits.

    Args:
        distances: float64 [n], from 0 up, one of them above.

    Returns:
        float64 [n] from 1 / `MOST` to `MOST`.
    """
    # Far beyond the limits a step is at the limit, wherever; so 0 need not be infinity.
    logs = -np.log(np.maximum(distances, 1e-9 * distances.max()))
    limit = math.log(MOST)

    def mean(shift: float) -> float:
        return float(np.clip(logs - shift, -limit, limit).mean())

    # The mean falls as the shift grows, from at least 0 to at most 0.
    shift = brentq(mean, logs.min(), logs.max()) if np.ptp(logs) else logs[0]
    return np.asarray(np.exp(np.clip(logs - shift, -limit, limit)).round(_DECIMALS), dtype=np.float64)


def seeded_factors(path: str | Path, layout: Layout, transformer: nn.Module) -> Floats:
    """Reads the factors of the step sizes of theta; those of weights are 1, which no ablation measures.

    Args:
        path: A sensitivity.json.
        layout: The meaning of theta.
        transformer: The transformer.

    Returns:
        float64 [n].

    Raises:
        UserError: If the file is unusable, or of another model, granularity or other sites.
    """
    found = read_sensitivity(path)
    if replace(found.model, name="") != fingerprint(transformer):
        raise UserError(
            f"sigma_from is {path}, which measured {found.model.name or 'a model'} ({found.model.transformer_class}, "
            f"{found.model.num_parameters / 1e6:.4g} M parameters): another architecture or size than the model of "
            "this run. Run ablate on this one."
        )
    if found.granularity != layout.granularity:
        raise UserError(
            f"sigma_from is {path}, which measured by {found.granularity}; this run has granularity "
            f"{layout.granularity}. Run ablate with --by {layout.granularity}."
        )
    if found.distances.keys() != set(layout.scale_names):
        odd = sorted(found.distances.keys() ^ set(layout.scale_names))[0]
        raise UserError(
            f"sigma_from is {path}, which measured other sites than this run scales, for example {odd}. Run ablate "
            "with the model.calibration of this run."
        )
    one = step_factors(np.array([found.distances[name] for name in layout.scale_names]))
    factors = np.ones(layout.num_parameters)
    num_scales = len(layout.members) * len(one)
    factors[:num_scales] = np.tile(one, len(layout.members))
    return factors


def measurement_digest(path: str | Path) -> str:
    """Tells measurements apart: of what step sizes depend on, nothing else.

    Args:
        path: A sensitivity.json.

    Returns:
        12 hexadecimal digits of a sha256.
    """
    found = read_sensitivity(path)
    text = json.dumps([found.granularity, sorted(found.distances.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
