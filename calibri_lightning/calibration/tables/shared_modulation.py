"""Blocks whose gates come from outside (one modulation for all of them) or pass a function first.

No rows of a Linear belong to one block's gate, so a scale folds into the branch's output projection.
"""

from __future__ import annotations

from torch import nn

from calibri_lightning.calibration.sites import (
    ArgumentChunk,
    OutputProjection,
    Row,
    TupleElement,
    WholeOutput,
    register,
)
from calibri_lightning.calibration.tables.helpers import branch, fused


@register("Flux2TransformerBlock")
def _flux2_double(block: nn.Module) -> tuple[Row, ...]:
    return (
        Row("attn", "image", ArgumentChunk("temb_mod_img", 6, 2), OutputProjection("attn.to_out.0")),
        Row("mlp", "image", ArgumentChunk("temb_mod_img", 6, 5), OutputProjection("ff.linear_out")),
        Row("attn", "text", ArgumentChunk("temb_mod_txt", 6, 2), OutputProjection("attn.to_add_out")),
        Row("mlp", "text", ArgumentChunk("temb_mod_txt", 6, 5), OutputProjection("ff_context.linear_out")),
    )


@register("Flux2SingleTransformerBlock")
def _flux2_single(block: nn.Module) -> tuple[Row, ...]:
    return fused(block, ArgumentChunk("temb_mod", 3, 2), OutputProjection("attn.to_out"), "attn.to_out")


@register("Flux3ModeTransformerBlock", "Flux3SingleTransformerBlock")
def _flux3(block: nn.Module) -> tuple[Row, ...]:
    """One gate for attention plus MLP, one attention and one MLP for all streams.

    Scaling the two branches, not the gates of the streams, keeps attention and MLP apart and folds exactly.
    """
    return branch("attn", "joint", "attn", "attn.to_out.0"), branch("mlp", "joint", "ff", "ff.linear_out")


@register("ChromaTransformerBlock")
def _chroma_double(block: nn.Module) -> tuple[Row, ...]:
    """FLUX.1 whose gates all come from one `distilled_guidance_layer`."""
    return (
        Row("attn", "image", TupleElement("norm1", 1), OutputProjection("attn.to_out.0")),
        Row("mlp", "image", TupleElement("norm1", 4), OutputProjection("ff.net.2")),
        Row("attn", "text", TupleElement("norm1_context", 1), OutputProjection("attn.to_add_out")),
        Row("mlp", "text", TupleElement("norm1_context", 4), OutputProjection("ff_context.net.2")),
    )


@register("ChromaSingleTransformerBlock")
def _chroma_single(block: nn.Module) -> tuple[Row, ...]:
    return fused(block, TupleElement("norm", 1), OutputProjection("proj_out"), "proj_out")


@register("QwenImage21TransformerBlock")
def _qwen_image_21(block: nn.Module) -> tuple[Row, ...]:
    """Gates pass a tanh, and with `causal_condition` the modulation has one row more than the batch."""
    return branch("attn", "joint", "attn", "attn.to_out.0"), branch("mlp", "joint", "img_mlp", "img_mlp.out")


@register("Krea2TransformerBlock")
def _krea2(block: nn.Module) -> tuple[Row, ...]:
    return branch("attn", "joint", "attn", "attn.to_out.0"), branch("mlp", "joint", "ff", "ff.down")


@register("ErnieImageSharedAdaLNBlock")
def _ernie(block: nn.Module) -> tuple[Row, ...]:
    """Attention runs on [B, S, H], the MLP on [S, B, H]."""
    return (
        branch("attn", "joint", "self_attention", "self_attention.to_out.0"),
        Row("mlp", "joint", WholeOutput("mlp", batch_dim=1), OutputProjection("mlp.linear_fc2")),
    )


@register("JoyImageTransformerBlock", "JoyImageEditPlusTransformerBlock")
def _joyimage(block: nn.Module) -> tuple[Row, ...]:
    """Each block adds a table to the shared modulation."""
    return (
        Row("attn", "image", TupleElement("img_mod", 2), OutputProjection("attn.img_attn_proj")),
        Row("mlp", "image", TupleElement("img_mod", 5), OutputProjection("img_mlp.net.2")),
        Row("attn", "text", TupleElement("txt_mod", 2), OutputProjection("attn.txt_attn_proj")),
        Row("mlp", "text", TupleElement("txt_mod", 5), OutputProjection("txt_mlp.net.2")),
    )


@register("NucleusMoEImageTransformerBlock")
def _nucleus(block: nn.Module) -> tuple[Row, ...]:
    """Gates are clamped and pass a tanh; a mixture of experts has no single output projection."""
    mlp = None if block.moe_enabled else "img_mlp.net.2"
    return branch("attn", "image", "attn", "attn.to_out.0"), branch("mlp", "image", "img_mlp", mlp)
