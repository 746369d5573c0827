"""LoRAs with an effect, for tests."""

from __future__ import annotations

import torch
from calibration_models import inputs, run
from torch import Tensor, nn

from calibri_lightning.adapters.lora import lora_parameters


def disturb(model: nn.Module, seed: int = 3) -> None:
    """Gives a new LoRA an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """What a model makes of a fixed batch, bit for bit the same for equal numbers.

    Frozen meanwhile: whether a Linear without bias folds its input into a matrix (and so the last bit) depends on
    whether its weight wants gradients (`should_fold` of ATen's matmul), even where none are taken.
    """
    wants = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    output = run(model, inputs(model, 2))
    for parameter, wanted in wants:
        parameter.requires_grad_(wanted)
    return output
