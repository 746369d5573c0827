"""One optimiser step of a policy: AdamW, gradients over all ranks, the guard against NaN, the bounds of theta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.checks import check_at_least, check_positive

THETA = "theta"
"""The name of the scales among the trained tensors."""


@dataclass(frozen=True)
class AdamWOptions:
    """AdamW and the clipping of gradients; the defaults are those of Flow-GRPO (arXiv 2505.05470), but for eps.

    Attributes:
        lr: Learning rate of network weights.
        scales_lr: Learning rate of scales, in units of the relative step sizes of `Layout.stds`: a guidance moves five
            times as far as a scale.
        betas: Decay of the first and second moments.
        weight_decay: Weight decay of network weights; scales have none, for 1 is their neutral value.
        eps: Added to the root of the second moment.
        max_grad_norm: Gradients are clipped to this norm, network weights and scales apart.
    """

    lr: float = 3e-4
    scales_lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: If one is out of its range.
        """
        for name in ("lr", "scales_lr", "eps", "max_grad_norm"):
            check_positive(f"optimizer.{name}", getattr(self, name))
        check_at_least("optimizer.weight_decay", self.weight_decay, 0, "it shrinks weights")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"optimizer.betas is {list(self.betas)}; it must be two numbers of at least 0 and below 1, the decays "
                "of the first and second moments. Set optimizer.betas accordingly, for example to [0.9, 0.999]."
            )

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
        """Makes the optimiser.

        Args:
            parameters: What is trained, by name.

        Returns:
            AdamW, scales and network weights in groups of their own.
        """
        groups = []
        weights = [parameter for name, parameter in parameters.items() if name != THETA]
        if weights:
            groups.append({"params": weights, "lr": self.lr, "weight_decay": self.weight_decay})
        if THETA in parameters:
            groups.append({"params": [parameters[THETA]], "lr": self.scales_lr, "weight_decay": 0.0})
        return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps)


@dataclass(frozen=True)
class ThetaBounds:
    """Where theta may go, and the units of its steps; float64 [n]."""

    lower: Tensor
    """Least values."""
    upper: Tensor
    """Largest values."""
    stds: Tensor
    """Relative step sizes."""


class GradientStep:
    """Takes optimiser steps, the same on all ranks.

    Args:
        options: The optimiser's settings.
        parameters: What is trained, by name.
        bounds: Of theta.
    """

    def __init__(self, options: AdamWOptions, parameters: Mapping[str, nn.Parameter], bounds: ThetaBounds) -> None:
        self.options, self.parameters, self.bounds = options, dict(parameters), bounds
        self.optimizer = options.build(parameters)

    @contextmanager
    def discarded(self) -> Iterator[None]:
        """Surrounds a backward pass that leaves no gradient: other ranks need it to happen, and nobody its result.

        To multiply its loss by 0 would not do: 0 times infinity is NaN.

        Yields:
            Nothing.
        """
        before = {name: parameter.grad for name, parameter in self.parameters.items()}
        self.optimizer.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            for name, grad in before.items():
                self.parameters[name].grad = grad

    def step(self, world_size: int) -> float:
        """Steps along the gradients that backward passes have left, and clears them.

        Args:
            world_size: Number of ranks, each of which has the gradient of its own pictures; the sum is taken.

        Returns:
            Norm of the whole gradient before clipping; not finite where the step was not taken.
        """
        self._sum_over_ranks(world_size)
        norms = [
            float(nn.utils.clip_grad_norm_(group["params"], self.options.max_grad_norm))
            for group in self.optimizer.param_groups
        ]
        norm = math.hypot(*norms)
        if math.isfinite(norm):
            self._advance()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _advance(self) -> None:
        theta = self.parameters.get(THETA)
        before = theta.detach().clone() if theta is not None else None
        self.optimizer.step()
        if theta is not None and before is not None:
            bounds = self.bounds
            moved = before + bounds.stds.to(theta.device) * (theta - before)
            theta.copy_(torch.clamp(moved, bounds.lower.to(theta.device), bounds.upper.to(theta.device)))

    def _sum_over_ranks(self, world_size: int) -> None:
        """Adds the ranks' gradients; one collective a dtype, whatever each rank had to do.

        Raw backward passes and this sum stand in for DistributedDataParallel's hooks, which expect one backward a
        forward and every parameter in use.
        """
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if world_size == 1:
            return
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            some = [grad for grad in grads if grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in some])
            torch.distributed.all_reduce(flat)
            for grad, piece in zip(some, flat.split([grad.numel() for grad in some]), strict=True):
                grad.copy_(piece.view_as(grad))
