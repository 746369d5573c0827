"""Blocks that add a table of their own to the time embedding: no module returns the gates.

The scale goes to the branch's output and folds into its output projection. Cross-attention has no gate here; its
sites are there for the asking (`SiteOptions.cross_attention`).
"""

from __future__ import annotations

from torch import nn

from calibri_lightning.calibration.sites import Row, register
from calibri_lightning.calibration.tables.helpers import ada_zero, branch
from calibri_lightning.errors import UserError


def _table_block(block: nn.Module, mlp: str, projection: str) -> tuple[Row, ...]:
    cross = branch("xattn", "image", "attn2", "attn2.to_out.0", "cross_attention")
    return (
        branch("attn", "image", "attn1", "attn1.to_out.0"),
        *(() if getattr(block, "attn2", None) is None else (cross,)),
        branch("mlp", "image", mlp, projection),
    )


@register("WanTransformerBlock", "SkyReelsV2TransformerBlock")
def _wan(block: nn.Module) -> tuple[Row, ...]:
    return _table_block(block, "ffn", "ffn.net.2")


@register("LTXVideoTransformerBlock")
def _ltx(block: nn.Module) -> tuple[Row, ...]:
    return _table_block(block, "ff", "ff.net.2")


@register("SanaTransformerBlock", "SanaVideoTransformerBlock")
def _sana(block: nn.Module) -> tuple[Row, ...]:
    """The video model's temporal convolution follows `conv_point` and is linear, without a bias."""
    return _table_block(block, "ff", "ff.conv_point")


@register("BasicTransformerBlock")
def _basic(block: nn.Module) -> tuple[Row, ...]:
    """PixArt (a table in the block) and DiT (a norm that returns the gates); the block of UNets is neither."""
    if block.norm_type == "ada_norm_single":
        return _table_block(block, "ff", "ff.net.2")
    if block.norm_type == "ada_norm_zero":
        return ada_zero("norm1", "image")
    raise UserError(
        f"A BasicTransformerBlock has norm_type {block.norm_type!r}. Sites are known for ada_norm_single (PixArt) and "
        "ada_norm_zero (DiT); the others belong to UNets and priors. Give a diffusion transformer."
    )
