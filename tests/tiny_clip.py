"""A tiny untrained CLIP model with its processor, saved as PickScore's published repository is."""

from __future__ import annotations

from pathlib import Path

import tiny_pipelines as tiny
import torch

PIXELS = 28
"""Side of the pictures that the model sees."""
TOKENS = 12
"""Tokens that the model reads, start and end included."""


def save_clip(folder: Path) -> Path:
    """Saves model, tokenizer and preprocessing; each letter is a token."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer, text = tiny.clip(TOKENS)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": PIXELS,
        "patch_size": 14,
    }
    config = CLIPConfig(
        text_config={**text.config.to_dict(), "num_hidden_layers": 2},
        vision_config=vision,
        projection_dim=8,
        initializer_factor=5.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    size = {"height": PIXELS, "width": PIXELS}
    images = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=size)
    model.save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder
