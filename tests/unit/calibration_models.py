"""Tiny untrained transformers and inputs for the calibration tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from calibri_lightning.calibration import Attachment, attach, find_sites


def tiny_sd3(num_layers: int = 3, dual: tuple[int, ...] = (0,), dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=num_layers,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            pos_embed_max_size=8,
            dual_attention_layers=dual,
            qk_norm="rms_norm",
        )
    return model.requires_grad_(False).eval().to(dtype)


def tiny_flux(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(4, 2, 2),
        )
    return model.requires_grad_(False).eval().to(dtype)


MODELS = pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])


def hooked(model: nn.Module) -> Attachment:
    return attach(model, find_sites(model))


def inputs(model: nn.Module, batch: int, seed: int = 1) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shared = {
        "encoder_hidden_states": draw(batch, 5, 12),
        "pooled_projections": draw(batch, 10),
        "return_dict": False,
    }
    if isinstance(model, FluxTransformer2DModel):
        ids = {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}
        return {
            "hidden_states": draw(batch, 6, 4),
            "timestep": torch.full((batch,), 0.5).to(dtype),
            **ids,
            **shared,
        }
    return {
        "hidden_states": draw(batch, 4, 8, 8),
        "timestep": torch.full((batch,), 500.0).to(dtype),
        **shared,
    }


def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    return model(**arguments)[0]


def row(arguments: dict[str, Any], index: int) -> dict[str, Any]:
    shared = ("img_ids", "txt_ids")
    return {k: v[index : index + 1] if isinstance(v, Tensor) and k not in shared else v for k, v in arguments.items()}


def random_scales(batch: int, num_sites: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(batch, num_sites, generator=generator, dtype=torch.float64) * 3 - 1).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
