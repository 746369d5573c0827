"""A tiny untrained CLIP model with its processor, saved as PickScore's published repository is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_pipelines as tiny
import torch
from PIL import Image
from torch import Tensor

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


@dataclass(frozen=True)
class ByHand:
    """What one picture and one prompt are to a saved model."""

    seen: Tensor
    """float64 [D], the embedding of the picture, of length 1."""
    cosine: float
    scale: float
    """The model's temperature."""


def by_hand(folder: Path, image: Tensor, text: str) -> ByHand:
    """Preprocesses and compares one picture float32 [3, H, W] and one prompt, step by step."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    ids = token_ids(CLIPTokenizer.from_pretrained(folder), text)
    with torch.no_grad():
        seen = model.vision_model(_pixels_by_hand(image)[None]).pooler_output
        read = model.text_model(torch.tensor([ids])).pooler_output
        one, other = model.visual_projection(seen)[0].double(), model.text_projection(read)[0].double()
        one, other = one / (one @ one).sqrt(), other / (other @ other).sqrt()
        return ByHand(one, float(one @ other), float(model.logit_scale.double().exp()))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Start, one token a letter, end; cut to what the model reads."""
    letters = [f"{c}</w>" if i == len(word) - 1 else c for word in text.split() for i, c in enumerate(word)]
    return tokenizer.convert_tokens_to_ids(["<|startoftext|>", *letters[: TOKENS - 2], "<|endoftext|>"])


def _pixels_by_hand(image: Tensor) -> Tensor:
    picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    width, height = (int(side * PIXELS / min(picture.size)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - PIXELS) // 2, (height - PIXELS) // 2
    pixels = np.asarray(picture.crop((left, top, left + PIXELS, top + PIXELS))) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor(pixels).permute(2, 0, 1).float()
