"""Weights of open_clip as a CLIPModel of transformers.

The two hold the same numbers under other names. open_clip keeps the three projections of an attention as one matrix,
and those of the towers' ends the other way round (Ilharco et al., open_clip, src/open_clip/{model,transformer}.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibri_lightning.rewards.loading import check_names

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

VISION_HEAD_WIDTH = 80
TEXT_HEAD_WIDTH = 64
"""Widths of the attention heads of ViT-H-14; the tensors do not tell them."""

_ENDS = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers spells it so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load_open_clip(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> CLIPModel:
    """Makes a CLIPModel of the weights of an open_clip ViT-H-14.

    Args:
        tensors: The state dict of open_clip's CLIP class.
        dtype: Type of the model's weights.

    Returns:
        The model on the CPU, frozen and in evaluation mode.

    Raises:
        ValueError: If these are weights of something else: one is missing, or there is one too many.
        RuntimeError: If one has another shape.
    """
    from transformers import CLIPModel

    depths = {tower: _depth(tensors, tower) for tower in _TOWERS}
    expected = {*_ENDS, *_TRANSPOSED, *(name for tower in _TOWERS for name in _names_of(tower, depths[tower]))}
    check_names(set(tensors), expected, "an open_clip ViT-H-14")
    config = _config(tensors, depths)
    with torch.device("meta"):  # without values: they would be drawn from the global generator
        model = CLIPModel(config)
    model.load_state_dict({name: value.to(dtype) for name, value in _renamed(tensors, depths)}, assign=True)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        # The only tensors that are not saved.
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    made: CLIPModel = model.requires_grad_(False).eval()
    return made


def _depth(tensors: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}.resblocks."
    numbers = [name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)


def _names_of(tower: str, depth: int) -> Iterator[str]:
    for i in range(depth):
        block = f"{tower}.resblocks.{i}"
        yield from (f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias")
        yield from (f"{block}.{module}.{part}" for module in _BLOCK for part in ("weight", "bias"))


def _renamed(tensors: Mapping[str, Tensor], depths: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    yield from ((ours, tensors[theirs]) for theirs, ours in _ENDS.items())
    yield from ((ours, tensors[theirs].T.contiguous()) for theirs, ours in _TRANSPOSED.items())
    for tower, model in _TOWERS.items():
        for i in range(depths[tower]):
            theirs, ours = f"{tower}.resblocks.{i}", f"{model}.encoder.layers.{i}"
            for part in ("weight", "bias"):
                # Copies, so that the joint matrix is not kept alive thrice.
                joint = tensors[f"{theirs}.attn.in_proj_{part}"].chunk(3)
                for letter, rows in zip("qkv", joint, strict=True):
                    yield f"{ours}.self_attn.{letter}_proj.{part}", rows.clone()
                yield from (
                    (f"{ours}.{name}.{part}", tensors[f"{theirs}.{module}.{part}"]) for module, name in _BLOCK.items()
                )


def _config(tensors: Mapping[str, Tensor], depths: Mapping[str, int]) -> CLIPConfig:
    from transformers import CLIPConfig

    num_tokens, text_width = tensors["positional_embedding"].shape
    vision_width, _, patch, _ = tensors["visual.conv1.weight"].shape
    vision: dict[str, Any] = {
        **_tower(tensors, "visual.transformer", depths, vision_width, VISION_HEAD_WIDTH),
        "patch_size": patch,
        "image_size": patch * math.isqrt(len(tensors["visual.positional_embedding"]) - 1),
    }
    text: dict[str, Any] = {
        **_tower(tensors, "transformer", depths, text_width, TEXT_HEAD_WIDTH),
        "vocab_size": len(tensors["token_embedding.weight"]),
        "max_position_embeddings": num_tokens,
        # transformers then takes the state at the highest token, as open_clip does.
        "eos_token_id": 2,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=tensors["text_projection"].shape[1])


def _tower(
    tensors: Mapping[str, Tensor], tower: str, depths: Mapping[str, int], width: int, head_width: int
) -> dict[str, Any]:
    if width % head_width:
        raise ValueError(f"these are not the weights of an open_clip ViT-H-14: {tower} is {width} wide")
    return {
        "hidden_size": width,
        "intermediate_size": len(tensors[f"{tower}.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": depths[tower],
        "num_attention_heads": width // head_width,
        "hidden_act": "gelu",  # of open_clip's own models; those of OpenAI have another
    }
