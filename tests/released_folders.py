"""The small files of models as released: enough for a plan, which builds networks from their configurations alone.

Sizes of transformers and autoencoders are those of `bench.models`, of text encoders those of their model cards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config_files import FAMILIES

from calibri_lightning.bench.models import RANDOM_MODELS

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77}
CLIP_G = CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_G |= {"projection_dim": 1280}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}
QWEN25_VL_7B_TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
QWEN25_VL_7B_TEXT |= {"num_attention_heads": 28, "num_key_value_heads": 4}
QWEN25_VL_7B_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
QWEN25_VL_7B_VISION |= {"out_hidden_size": 3584}

TEXT_ENCODERS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "flux1_dev": {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    "sd35_medium": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    "qwen_image": {
        "text_encoder": {"text_config": QWEN25_VL_7B_TEXT, "vision_config": QWEN25_VL_7B_VISION},
    },
}
PARAMETERS = {
    "flux1_dev": {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},
    "sd35_medium": {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656},
    "qwen_image": {"text_encoder": 8_292_166_656},
}
"""Of the released text encoders."""


def write_folder(family: str, folder: Path, num_blocks: int | None = None) -> Path:
    """Saves a tiny model of the class, takes away its weights, and gives its networks the released sizes.

    Args:
        family: A folder of configs/.
        folder: Where to.
        num_blocks: Blocks of the transformer; as released by default.

    Returns:
        The folder.
    """
    FAMILIES[family].tiny().save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    recipe = RANDOM_MODELS[str(FAMILIES[family].recipe)]
    _resize(folder / "transformer", "_class_name", {**recipe.config, **recipe.slice(num_blocks)})
    _resize(folder / "vae", "_class_name", recipe.autoencoder_config)
    for name, sizes in TEXT_ENCODERS[family].items():
        _resize(folder / name, "model_type", sizes)
    return folder


def _resize(component: Path, kind: str, sizes: Mapping[str, Any]) -> None:
    """Keeps the class of a component; what is not given is its class's default, as released."""
    file = component / "config.json"
    file.write_text(json.dumps({kind: json.loads(file.read_text())[kind], **sizes}))
