"""Optimiser steps of a policy: AdamW as torch has it, bounds and units of theta, NaN, and the sum over ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.gradient_step import THETA, AdamWOptions, GradientStep, ThetaBounds

STDS = torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64)
BOUNDS = ThetaBounds(torch.full((3,), -1.0).double(), torch.tensor([2.0, 1.0005, 20.0]).double(), STDS)


def trained() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {THETA: nn.Parameter(torch.ones(3).double()), "a": nn.Parameter(torch.randn(4, 2, generator=generator))}


def gradients(parameters: dict[str, nn.Parameter], scale: float = 1.0) -> None:
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = scale * torch.linspace(-1, 1 + number, parameter.numel()).view_as(parameter).to(parameter)


def test_network_weights_step_as_adamw_of_torch() -> None:
    options, parameters = AdamWOptions(lr=0.1, weight_decay=0.3, max_grad_norm=1e9), trained()
    alone = nn.Parameter(parameters["a"].detach().clone())
    reference = torch.optim.AdamW([alone], lr=0.1, weight_decay=0.3, betas=options.betas, eps=options.eps)
    stepper = GradientStep(options, parameters, BOUNDS)
    for scale in (1.0, 0.3, -2.0):
        gradients(parameters, scale)
        alone.grad = parameters["a"].grad.clone() if parameters["a"].grad is not None else None
        stepper.step(1)
        reference.step()
    assert torch.equal(parameters["a"], alone)


def test_theta_moves_in_units_of_its_stds_without_decay_and_stays_in_its_bounds() -> None:
    parameters = trained()
    stepper = GradientStep(AdamWOptions(scales_lr=0.01, weight_decay=0.5), parameters, BOUNDS)
    parameters[THETA].grad = torch.tensor([1.0, -1.0, -1.0]).double()
    stepper.step(1)
    # Adam's first step is lr times the sign of the gradient.
    assert parameters[THETA].tolist() == pytest.approx([1 - 0.01, 1.0005, 1 + 0.05], abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameters = trained()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    stepper = GradientStep(AdamWOptions(), parameters, BOUNDS)
    gradients(parameters)
    assert parameters["a"].grad is not None
    parameters["a"].grad[0, 0] = bad
    assert not math.isfinite(stepper.step(1))
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())
    assert not stepper.optimizer.state, "no moment has seen it"
    assert all(parameter.grad is None for parameter in parameters.values()), "and none is left for the next step"


def test_the_norm_is_that_of_the_whole_gradient_before_clipping() -> None:
    parameters = trained()
    gradients(parameters)
    whole = torch.cat([p.grad.flatten().double() for p in parameters.values() if p.grad is not None]).norm().item()
    stepper = GradientStep(AdamWOptions(max_grad_norm=1e-3), parameters, BOUNDS)
    assert stepper.step(1) == pytest.approx(whole)


def test_scales_and_weights_are_clipped_apart() -> None:
    """A scale has one number and a LoRA has millions: a common norm would let one silence the other."""
    parameters = trained()
    stepper = GradientStep(AdamWOptions(max_grad_norm=1.0), parameters, BOUNDS)
    gradients(parameters)
    assert parameters["a"].grad is not None
    parameters["a"].grad *= 1e6
    theta = torch.linspace(-1, 1, 3).double()
    stepper.step(1)
    moments = stepper.optimizer.state[parameters[THETA]]["exp_avg"]
    assert torch.allclose(moments, 0.1 * theta / theta.norm().clamp(min=1), rtol=1e-5)


def _rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parameters = trained()
    stepper = GradientStep(AdamWOptions(lr=0.1), parameters, BOUNDS)
    # Rank 1 had no pictures for the network's weights: the collectives are the same all the same.
    gradients(parameters, 0.5)
    if rank == 1:
        parameters["a"].grad = None
    norm = stepper.step(2)
    torch.save({"norm": norm, **{n: p.detach() for n, p in parameters.items()}}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_step_along_the_sum_of_their_gradients(tmp_path: Path) -> None:
    spawn(_rank, args=(str(tmp_path),), nprocs=2)
    made = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    parameters = trained()
    gradients(parameters, 0.5)
    assert parameters[THETA].grad is not None
    parameters[THETA].grad *= 2
    norm = GradientStep(AdamWOptions(lr=0.1), parameters, BOUNDS).step(1)
    for rank in made:
        assert rank["norm"] == pytest.approx(norm)
        assert all(torch.equal(rank[name], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"scales_lr": -1.0},
        {"weight_decay": -0.1},
        {"max_grad_norm": math.nan},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.999)},
        {"betas": (math.nan, 0.999)},
        {"betas": (0.9,)},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        AdamWOptions(**change)
