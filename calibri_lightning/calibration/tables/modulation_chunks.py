"""Blocks with a modulation of their own that returns shifts, scales and gates in one tensor.

A scale folds into the rows of the modulation's Linear which make the gate.
"""

from __future__ import annotations

from torch import nn

from calibri_lightning.calibration.sites import Row, RowChunk, TupleElement, WholeOutput, register
from calibri_lightning.calibration.tables.helpers import chunk_gate


@register("QwenImageTransformerBlock")
def _qwen_image(block: nn.Module) -> tuple[Row, ...]:
    """The text branches of the last block reach no output.

    Edit models with `zero_cond_t` modulate noisy and clean tokens by two rows a sample, so that there the scale of
    a sample goes to the branch instead.
    """
    text = (
        chunk_gate("attn", "text", "txt_mod", "txt_mod.1", 6, 2),
        chunk_gate("mlp", "text", "txt_mod", "txt_mod.1", 6, 5),
    )
    if block.zero_cond_t:
        return (
            Row("attn", "image", TupleElement("attn", 0), RowChunk("img_mod.1", 6, 2)),
            Row("mlp", "image", WholeOutput("img_mlp"), RowChunk("img_mod.1", 6, 5)),
            *text,
        )
    return (
        chunk_gate("attn", "image", "img_mod", "img_mod.1", 6, 2),
        chunk_gate("mlp", "image", "img_mod", "img_mod.1", 6, 5),
        *text,
    )


@register("HiDreamBlock")
def _hidream(block: nn.Module) -> tuple[Row, ...]:
    """HiDream-I1: a shell around a double or a single block.

    Its routed experts run under `no_grad` in eval mode (`MOEFeedForwardSwiGLU.moe_infer`): gradients with respect to
    scales lack what passes through the experts of later blocks. Forwards, and so CMA-ES, are exact.
    """
    modulation, linear = "block.adaLN_modulation", "block.adaLN_modulation.1"
    if not hasattr(block.block, "ff_t"):
        return (
            chunk_gate("attn", "joint", modulation, linear, 6, 2),
            chunk_gate("mlp", "joint", modulation, linear, 6, 5),
        )
    return (
        chunk_gate("attn", "image", modulation, linear, 12, 2),
        chunk_gate("mlp", "image", modulation, linear, 12, 5),
        chunk_gate("attn", "text", modulation, linear, 12, 8),
        chunk_gate("mlp", "text", modulation, linear, 12, 11),
    )


@register("Kandinsky5TransformerEncoderBlock")
def _kandinsky_text(block: nn.Module) -> tuple[Row, ...]:
    modulation, linear = "text_modulation", "text_modulation.out_layer"
    return (
        chunk_gate("attn", "text", modulation, linear, 6, 2),
        chunk_gate("mlp", "text", modulation, linear, 6, 5),
    )


@register("Kandinsky5TransformerDecoderBlock")
def _kandinsky_image(block: nn.Module) -> tuple[Row, ...]:
    """Here the cross-attention has a gate."""
    modulation, linear = "visual_modulation", "visual_modulation.out_layer"
    return (
        chunk_gate("attn", "image", modulation, linear, 9, 2),
        chunk_gate("xattn", "image", modulation, linear, 9, 5),
        chunk_gate("mlp", "image", modulation, linear, 9, 8),
    )


@register("PRXBlock")
def _prx(block: nn.Module) -> tuple[Row, ...]:
    """The modulation returns a tuple of tuples, so the Linear in it is hooked."""
    return (
        chunk_gate("attn", "image", "modulation.lin", "modulation.lin", 6, 2),
        chunk_gate("mlp", "image", "modulation.lin", "modulation.lin", 6, 5),
    )
