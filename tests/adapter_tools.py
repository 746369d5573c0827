"""LoRAs with an effect, for tests."""

from __future__ import annotations

import torch
from torch import nn

from calibri_lightning.adapters.lora import lora_parameters


def disturb(model: nn.Module, seed: int = 3) -> None:
    """Gives a new LoRA an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model).values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
