"""Estimates what training by gradients takes on top: a LoRA, the optimiser, copies of the policy, and activations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from calibri_lightning.adapters.lora import LoraOptions, add_lora
from calibri_lightning.adapters.policy import Policy, Trains
from calibri_lightning.calibration import Layout, attach
from calibri_lightning.calibration.scales import Rows
from calibri_lightning.errors import UserError
from calibri_lightning.planning.configured import class_of
from calibri_lightning.planning.live import FusedAttention, LiveBytes
from calibri_lightning.sampling.denoiser import Denoiser
from calibri_lightning.strategies.alternate import Alternate
from calibri_lightning.strategies.phases import union
from calibri_lightning.strategies.policy_run import PolicyRun

if TYPE_CHECKING:
    from calibri_lightning.backbones.native import Native

_COPIES = 2
"""Copies of the policy in its own type: where it started, and the best so far."""
_ADAM = 2
"""Moments of AdamW for each trained number."""


@dataclass(frozen=True)
class TrainingNeeds:
    """What a strategy with gradients is told that memory depends on."""

    trains: Trains
    pictures: int
    """Pictures of a unit, which is rolled out and trained on as one batch."""
    checkpoints: bool
    """Whether activations are computed again in the backward."""
    has_ema: bool
    """Whether there is a moving average."""
    kept_images: int
    """Pictures of a training step: of each, latents of every trained step are kept until it has been trained on."""
    kept_latents: int
    """Latents that are kept of a picture: two for each trained step."""
    on_device: bool
    """Whether they are kept on the device."""


@dataclass(frozen=True)
class TrainingPlan:
    """What one process needs for training, in bytes."""

    parameters: int
    """Numbers that are trained."""
    parameter_bytes: int
    """Their memory, where it comes on top of the model: a LoRA's."""
    gradient_bytes: int
    optimizer_bytes: int
    """AdamW's two moments."""
    copy_bytes: int
    """The policy as the run began, its best, and its moving average with the copy that is validated."""
    trajectory_bytes: int
    """Latents of all pictures of a training step on one process alone."""
    backward_bytes: int | None
    """Peak of a forward and its backward beyond all that; None where the model cannot be followed."""

    @property
    def resident(self) -> int:
        """What stays on the device."""
        state = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.copy_bytes
        return state + self.trajectory_bytes


def read_training(model: dict[str, Any], most_pictures: int) -> TrainingNeeds | None:
    """Reads what a configured strategy trains.

    Args:
        model: The configuration of the module.
        most_pictures: Pictures that `rows_per_forward` allows in a forward.

    Returns:
        What it needs, of phases in turn the most; None for a search without gradients.
    """
    if issubclass(class_of(model["strategy"]), Alternate):
        phases = [model | {"strategy": phase["strategy"]} for phase in model["strategy"]["init_args"]["phases"] or ()]
        return _most([needs for phase in phases if (needs := read_training(phase, most_pictures)) is not None])
    given = dict(model["strategy"].get("init_args") or {})
    if not issubclass(class_of(model["strategy"]), PolicyRun):
        return None
    steps = int(given["num_steps"] or model["num_steps"])
    return TrainingNeeds(
        trains=given["train"],
        pictures=int(given["pictures_per_unit"] or min(most_pictures, given["group_size"])),
        checkpoints=bool(given["gradient_checkpointing"]),
        has_ema=given["ema"] is not None,
        kept_images=int(given["num_groups"]) * int(given["group_size"]),
        # A strategy without a window keeps finished pictures alone.
        kept_latents=2 * _window_steps(given["window"], steps) if "window" in given else 1,
        on_device=not given["offload"],
    )


def _most(phases: Sequence[TrainingNeeds]) -> TrainingNeeds | None:
    """What phases in turn need at most; None where none of them has gradients."""
    if not phases:
        return None
    return TrainingNeeds(
        # Phases that train different things share one policy, which `union` refuses where there is none.
        trains=union([phase.trains for phase in phases]) or "full",
        pictures=max(phase.pictures for phase in phases),
        checkpoints=all(phase.checkpoints for phase in phases),
        has_ema=any(phase.has_ema for phase in phases),
        kept_images=max(phase.kept_images for phase in phases),
        kept_latents=max(phase.kept_latents for phase in phases),
        on_device=any(phase.on_device for phase in phases),
    )


def _window_steps(config: dict[str, Any] | None, num_steps: int) -> int:
    from calibri_lightning.sampling.windows import AllSteps, Window

    window: Window = AllSteps() if config is None else class_of(config)(**config.get("init_args") or {})
    window.check(num_steps)
    return len(window.steps(0, 0, num_steps))


def sketch_policy(backbone: Native, layout: Layout, trains: Trains, lora: LoraOptions | None) -> Policy:
    """Lets a sketched model want the gradients of a run; adds the LoRA.

    Args:
        backbone: The model, a sketch; changed in place.
        layout: The meaning of theta.
        trains: What is trained.
        lora: The LoRA, as configured.

    Returns:
        The policy.
    """
    if trains in ("lora", "both"):
        add_lora(backbone.transformer, lora or LoraOptions(), 0)
    theta = nn.Parameter(torch.tensor(layout.start))
    return Policy(theta, backbone.transformer, trains, theta)


def plan_training(backbone: Native, layout: Layout, policy: Policy, needs: TrainingNeeds) -> TrainingPlan:
    """Estimates what training takes on one process.

    Args:
        backbone: The model, a sketch.
        layout: The meaning of theta.
        policy: What is trained.
        needs: How.

    Returns:
        The plan.

    Raises:
        UserError: If the transformer cannot compute activations again.
    """
    parameters = list(policy.parameters().values())
    count = sum(parameter.numel() for parameter in parameters)
    size = sum(parameter.nbytes for parameter in parameters)
    wide = sum(parameter.numel() * max(parameter.element_size(), 4) for parameter in parameters)
    full = needs.trains == "full"
    latent_bytes = 4 * torch.Size(backbone.latent_shape()).numel()
    return TrainingPlan(
        parameters=count,
        parameter_bytes=0 if full else size,
        gradient_bytes=size,
        optimizer_bytes=_ADAM * size,
        # Where all weights are trained, the model of the start is kept twice: as start and as base.
        copy_bytes=(_COPIES + full) * size + (wide + size if needs.has_ema else 0),
        trajectory_bytes=needs.kept_images * needs.kept_latents * latent_bytes if needs.on_device else 0,
        backward_bytes=_backward_peak(backbone, layout, policy, needs),
    )


def _backward_peak(backbone: Native, layout: Layout, policy: Policy, needs: TrainingNeeds) -> int | None:
    """Peak of the replay of one step and its backward, beyond weights and gradients."""
    if needs.checkpoints:
        _checkpoint(backbone)
    for parameter in policy.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    attachment = attach(backbone.transformer, layout.sites)
    place = [0] * needs.pictures
    guided = any(member.prompt == "negative" for member in layout.members)
    try:
        with torch.no_grad():
            text = backbone.example().take(place)
            negative = backbone.example().take(place) if guided else None
            noise = backbone.noise(range(needs.pictures))
        with LiveBytes(backbone.device) as live, FusedAttention():
            rows = layout.rows(policy.theta[None] if policy.trains_theta else policy.theta.detach()[None])
            spread = Rows(rows.scales[place], rows.weights[place])
            denoiser = Denoiser(backbone, attachment, spread, layout.members, text, negative, 2, policy.trains_theta)
            with denoiser.attached():
                denoiser.velocity(noise, 0).square().sum().backward()
    # What a sketch answers where a model asks for numbers.
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        attachment.detach()
    return live.peak


def _checkpoint(backbone: Native) -> None:
    transformer: Any = backbone.transformer
    if not getattr(transformer, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"strategy.gradient_checkpointing is true, but {type(transformer).__name__} does not support it. Set it to "
            "false, and lower strategy.pictures_per_unit instead."
        )
    transformer.enable_gradient_checkpointing(_computed_again)


def _computed_again(module: nn.Module, *args: Any) -> Any:
    """What diffusers does, with fused attention in the second forward too: during a backward no mode is on."""
    contexts = (nullcontext(), FusedAttention())
    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)
