"""What the numbers of a study depend on, as plain values: a study that goes on must find all of it unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from calibri_lightning.arrays import Floats
from calibri_lightning.calibration import weights_digest
from calibri_lightning.module import CalibriModule


def request_of(module: CalibriModule, thetas: Sequence[Floats], weights: Sequence[str]) -> dict[str, object]:
    """Describes a module.

    Args:
        module: The module, on its device.
        thetas: The candidates of each of its groups, float64 [k, n].
        weights: The copy of the network's weights that draws each group.

    Returns:
        Values for JSON.
    """
    digests = []
    for name in dict.fromkeys(weights):
        with module.policy.using(name):
            digests.append(weights_digest(module.backbone.transformer, with_adapter=True))
    return {
        "model": module.backbone.name,
        "weights": digests,
        "thetas": [hashlib.sha256(theta.tobytes()).hexdigest() for theta in thetas],
        "members": [[member.prompt, member.weight] for member in module.layout.members],
        "rewards": module.rewards.recipe,
        "picture": list(module.backbone.image_size),
        "num_steps": module.num_steps,
        "rows_per_forward": module.engine.rows_per_forward,
        "precision": str(module.trainer.precision),
        "compiled": module.engine.compiles,
        "device": module.device.type,
        "seed": module.seed,
    }
