"""Blocks that normalise each branch's output before it is gated.

A scale before that norm is undone by it, so the scale goes behind, and folds into the norm's affine weight.
(Folding into the gate's Linear is wrong too: the gates pass a tanh.) Blocks of these classes without a modulation,
`context_refiner`, have no gates; their branches are scaled all the same.
"""

from __future__ import annotations

from torch import nn

from calibri_lightning.calibration.sites import Row, WholeOutput, register
from calibri_lightning.calibration.tables.helpers import post_norm


@register("ZImageTransformerBlock", "Ideogram4TransformerBlock")
def _z_image(block: nn.Module) -> tuple[Row, ...]:
    return post_norm("attn", "joint", "attention_norm2"), post_norm("mlp", "joint", "ffn_norm2")


@register("BriaFibo2TransformerBlock")
def _fibo2(block: nn.Module) -> tuple[Row, ...]:
    """Some blocks look at the prompt's embeddings again, through a learned gate."""
    cross = () if block.cross_attention is None else (post_norm("xattn", "joint", "cross_attn_norm2"),)
    return post_norm("attn", "joint", "attention_norm2"), *cross, post_norm("mlp", "joint", "ffn_norm2")


@register("Lumina2TransformerBlock")
def _lumina2(block: nn.Module) -> tuple[Row, ...]:
    return post_norm("attn", "joint", "norm2"), post_norm("mlp", "joint", "ffn_norm2")


@register("LuminaNextDiTBlock")
def _lumina_next(block: nn.Module) -> tuple[Row, ...]:
    """Self- and cross-attention are summed before the norm and make one branch."""
    return post_norm("attn", "image", "norm2"), post_norm("mlp", "image", "ffn_norm2")


@register("MochiTransformerBlock")
def _mochi(block: nn.Module) -> tuple[Row, ...]:
    """The norms have no weight, so nothing can carry a scale; the last block has no text branch."""
    image = Row("attn", "image", WholeOutput("norm2"), None), Row("mlp", "image", WholeOutput("norm4"), None)
    text = (
        Row("attn", "text", WholeOutput("norm2_context"), None),
        Row("mlp", "text", WholeOutput("norm4_context"), None),
    )
    return image if block.context_pre_only else (*image, *text)
