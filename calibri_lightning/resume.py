"""What a checkpoint holds, and what must agree for a run to go on from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from calibri_lightning.calibration import FixedWeights, Layout, SiteOptions, fingerprint
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.summary import Budget
from calibri_lightning.rewards.watch import Watch
from calibri_lightning.strategies.base import Candidate
from calibri_lightning.trace import Trace

if TYPE_CHECKING:
    from calibri_lightning.module import CalibriModule

KEY = "calibri_lightning"
"""Where our own part of a checkpoint stands."""


def save_run(module: CalibriModule, checkpoint: dict[str, Any]) -> None:
    """Puts a run's state into a checkpoint and takes the frozen base out, which is not ours to copy.

    Args:
        module: The module.
        checkpoint: What Lightning has collected; changed in place.
    """
    checkpoint["state_dict"] = keep_trainable(module, checkpoint["state_dict"])
    checkpoint[KEY] = {
        "describes": describe(module, module.layout, module.backbone.transformer, module.fixed_weights),
        "trace": module.trace.state(),
        "blend": module.blend.state(),
        "watch": module.watch.state(),
        "rows_per_forward": module.engine.rows_per_forward,
        "at_once": module.engine.at_once,
        "policy": module.policy.state_dict(),
        "answer": {"theta": torch.from_numpy(module.answer.theta.copy()), "weights": module.answer.weights},
        "budget": [module.budget.images, module.budget.forwards, module.budget.device_seconds],
    }


def restore_run(module: CalibriModule, checkpoint: Mapping[str, Any]) -> None:
    """Takes a run's state out of a checkpoint.

    Args:
        module: The module; changed in place.
        checkpoint: What `save_run` made.

    Raises:
        UserError: If the checkpoint is of a run that trains something else, of another model or of other parameters.
    """
    # First: where other tensors are trained, the frozen ones differ, too, and "other weights" would explain nothing.
    module.policy.require_trains(checkpoint[KEY]["policy"])
    here = describe(module, module.layout, module.backbone.transformer, module.fixed_weights)
    require_same(here, checkpoint)
    module.budget, module.trace = Budget(*checkpoint[KEY]["budget"]), Trace(**checkpoint[KEY]["trace"])
    # Absent from checkpoints of versions that knew neither.
    if "blend" in checkpoint[KEY]:
        module.blend.load_state(checkpoint[KEY]["blend"])
        module.watch = Watch(**checkpoint[KEY]["watch"])
    module.policy.load_state_dict(checkpoint[KEY]["policy"])
    answer = checkpoint[KEY]["answer"]
    module.answer = Candidate(answer["theta"].numpy().astype(np.float64), answer["weights"])
    module.resumed_step = int(checkpoint["global_step"])
    recorded = checkpoint[KEY].get("rows_per_forward")
    if module.engine.rows_are_automatic and recorded is not None:
        module.engine.use_rows(recorded)
    # Memory that ran out once would run out again. Absent from checkpoints of earlier versions.
    at_once = checkpoint[KEY].get("at_once")
    if at_once is not None:
        module.engine.evaluator.sample_at_most(at_once)


def describe(module: nn.Module, layout: Layout, transformer: nn.Module, weights: FixedWeights) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that loads it.

    Args:
        module: The module.
        layout: The meaning of theta.
        transformer: The model.
        weights: What tells those of its weights apart that the run does not train.

    Returns:
        Plain values.
    """
    made = fingerprint(transformer)
    return {
        "model": [made.transformer_class, made.num_parameters, made.sites_hash],
        "weights": weights.digest,
        "parameters": list(layout.names),
        "site_options": asdict(layout.site_options),
        "trained": {name: list(p.shape) for name, p in own_parameters(module)},
    }


def require_same(here: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Checks that a checkpoint is of the model and of the parameters of this run.

    Non-strict loading would hide a missing tensor, and two layouts may have equally many parameters.

    Args:
        here: What `describe` says of this run.
        checkpoint: The checkpoint.

    Raises:
        UserError: If it is not.
    """
    there = dict(checkpoint[KEY]["describes"])
    held = {name: list(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    details = []
    if there["model"] != here["model"]:
        details.append(f"its model is another {there['model'][0]}, of {there['model'][1]:,} parameters")
    elif there["weights"] != here["weights"]:
        details.append("its model has other weights than this one")
    if there["parameters"] != here["parameters"]:
        odd = sorted(set(there["parameters"]) ^ set(here["parameters"])) or ["their order"]
        details.append(
            f"it has {len(there['parameters'])} parameters and this run {len(here['parameters'])}, which differ, "
            f"for example, in {odd[0]}"
        )
    elif there.get("site_options", asdict(SiteOptions())) != here["site_options"]:
        details.append("its scales of whole blocks act on other sites (cross_attention, split_fused)")
    elif held != here["trained"]:
        odd = sorted(name for name in held.keys() | here["trained"] if held.get(name) != here["trained"].get(name))
        details.append(f"{odd[0]} is absent or of another shape")
    if details:
        raise UserError(
            f"The checkpoint does not fit this run: {'; '.join(details)}. --ckpt_path takes a run's own model, "
            "granularity, members, weight_mode and site options: restore its config.yaml, or start a new run with "
            "--model.init_from."
        )


def keep_trainable(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops the networks from a state dict: the frozen base is not ours to copy, the policy has what is trained.

    Args:
        module: The module.
        state: Its state dict.

    Returns:
        The module's own trainable part.
    """
    names = {name for name, _ in own_parameters(module)}
    return {name: tensor for name, tensor in state.items() if name in names}


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Lists what a module trains besides the networks: theta.

    Args:
        module: The module.

    Returns:
        Parameters by name.
    """
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad and not name.startswith("networks."))
