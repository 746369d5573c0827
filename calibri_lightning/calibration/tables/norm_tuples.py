"""Blocks whose adaptive norms return the gates in a tuple, made by a Linear of each block's own.

A scale folds into the rows of that Linear which make the gate. `CogView4`, `GLM-Image` and `CogVideoX` run
picture and text through the same projections, so for them no other fold exists.
"""

from __future__ import annotations

from torch import nn

from calibri_lightning.calibration.sites import Row, RowChunk, TupleElement, WholeOutput, register
from calibri_lightning.calibration.tables.helpers import ada_zero, fused, tuple_gate


@register("JointTransformerBlock")
def _sd3(block: nn.Module) -> tuple[Row, ...]:
    """SD3 and SD3.5: dual attention adds a gate; the last block has no text branch."""
    if block.use_dual_attention:
        rows = (*ada_zero("norm1", "image", 9), tuple_gate("attn2", "image", "norm1", 6, 9, 8))
    else:
        rows = ada_zero("norm1", "image")
    return rows if block.context_pre_only else (*rows, *ada_zero("norm1_context", "text"))


# In AuraFlow the attention reaches the stream through the MLP alone: its gate stands before the second norm.
@register("FluxTransformerBlock", "BriaTransformerBlock", "BriaFiboTransformerBlock", "LongCatImageTransformerBlock")
@register("OvisImageTransformerBlock", "HunyuanImageTransformerBlock", "HunyuanVideoTransformerBlock")
@register("HunyuanVideo15TransformerBlock", "AuraFlowJointTransformerBlock")
def _double(block: nn.Module) -> tuple[Row, ...]:
    return (*ada_zero("norm1", "image"), *ada_zero("norm1_context", "text"))


@register("FluxSingleTransformerBlock", "BriaSingleTransformerBlock", "BriaFiboSingleTransformerBlock")
@register("LongCatImageSingleTransformerBlock", "OvisImageSingleTransformerBlock")
@register("HunyuanImageSingleTransformerBlock", "HunyuanVideoSingleTransformerBlock")
def _single(block: nn.Module) -> tuple[Row, ...]:
    return fused(block, TupleElement("norm", 1), RowChunk("norm.linear", 3, 2), "proj_out")


@register("HunyuanVideoTokenReplaceTransformerBlock")
def _token_replace(block: nn.Module) -> tuple[Row, ...]:
    """HunyuanVideo I2V: the first frame has gates of its own, from the same Linear; the branch has both."""
    return (
        Row("attn", "image", TupleElement("attn", 0), RowChunk("norm1.linear", 6, 2)),
        Row("mlp", "image", WholeOutput("ff"), RowChunk("norm1.linear", 6, 5)),
        *ada_zero("norm1_context", "text"),
    )


@register("HunyuanVideoTokenReplaceSingleTransformerBlock")
def _token_replace_single(block: nn.Module) -> tuple[Row, ...]:
    return fused(block, WholeOutput("proj_out"), RowChunk("norm.linear", 3, 2), "proj_out")


@register("HunyuanImageIndividualTokenRefinerBlock", "HunyuanVideoIndividualTokenRefinerBlock")
@register("HunyuanVideo15IndividualTokenRefinerBlock")
def _token_refiner(block: nn.Module) -> tuple[Row, ...]:
    return tuple_gate("attn", "text", "norm_out", 0, 2, 0), tuple_gate("mlp", "text", "norm_out", 1, 2, 1)


@register("AuraFlowSingleTransformerBlock")
def _auraflow_single(block: nn.Module) -> tuple[Row, ...]:
    return ada_zero("norm1", "joint")


@register("CogView3PlusTransformerBlock")
def _cogview3(block: nn.Module) -> tuple[Row, ...]:
    return _two_streams(2, 5, 8, 11)


@register("CogView4TransformerBlock", "GlmImageTransformerBlock")
def _cogview4(block: nn.Module) -> tuple[Row, ...]:
    """The Linear's rows alternate between picture and text, the tuple does not."""
    return _two_streams(4, 10, 5, 11)


def _two_streams(attn: int, mlp: int, text_attn: int, text_mlp: int) -> tuple[Row, ...]:
    """One norm modulates both streams; given are the chunks of its Linear that make the gates."""
    return (
        tuple_gate("attn", "image", "norm1", 1, 12, attn),
        tuple_gate("mlp", "image", "norm1", 4, 12, mlp),
        tuple_gate("attn", "text", "norm1", 6, 12, text_attn),
        tuple_gate("mlp", "text", "norm1", 9, 12, text_mlp),
    )


@register("CogVideoXBlock", "ConsisIDBlock")
def _cogvideox(block: nn.Module) -> tuple[Row, ...]:
    return (
        tuple_gate("attn", "image", "norm1", 2, 6, 2),
        tuple_gate("attn", "text", "norm1", 3, 6, 5),
        tuple_gate("mlp", "image", "norm2", 2, 6, 2),
        tuple_gate("mlp", "text", "norm2", 3, 6, 5),
    )
