"""Blocks that add every branch to the stream as it is: all of them are sites."""

from __future__ import annotations

from torch import nn

from calibri_lightning.calibration.sites import Row, register
from calibri_lightning.calibration.tables.helpers import branch


@register("HunyuanDiTBlock")
def _hunyuan_dit(block: nn.Module) -> tuple[Row, ...]:
    return (
        branch("attn", "image", "attn1", "attn1.to_out.0"),
        branch("xattn", "image", "attn2", "attn2.to_out.0"),
        branch("mlp", "image", "ff", "ff.net.2"),
    )


@register("OmniGenBlock")
def _omnigen(block: nn.Module) -> tuple[Row, ...]:
    return branch("attn", "joint", "self_attn", "self_attn.to_out.0"), branch("mlp", "joint", "mlp", "mlp.down_proj")
