"""Tiny untrained vision-language models of the Qwen-VL kind, saved as the published repositories are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["qwen2_5_vl", "qwen3_vl"]

PATCH: dict[Kind, int] = {"qwen2_5_vl": 14, "qwen3_vl": 16}
"""Side of a patch in pixels."""
FEWEST, MOST = 32 * 32, 64 * 96
"""Range of the pixels that a picture is resized to."""
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = ("Yes", "yes", "No", "no", "two", "Two")
"""Words that are one token; all else is one token a byte. " Yes" is one token, too."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """A Qwen tokenizer to which each byte is a token, and some words."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    merges, pieces = [], []
    for word in WORDS:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
    merges.append(("Ġ", "Yes"))
    pieces.append("ĠYes")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces, *CONTROL]
    made = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        pad_token="<|endoftext|>",
        extra_special_tokens=list(CONTROL[1:]),
    )
    made.chat_template = TEMPLATE
    return made


def _config(kind: Kind, reader: Any) -> Any:
    from transformers import AutoConfig

    ids = dict(zip(CONTROL, reader.convert_tokens_to_ids(list(CONTROL)), strict=True))
    text = {
        "vocab_size": len(reader),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "initializer_range": 0.3,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    seeing: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": PATCH[kind],
        "initializer_range": 0.3,
    }
    if kind == "qwen2_5_vl":
        seeing |= {"window_size": 56, "fullatt_block_indexes": [1]}
    else:
        seeing |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return AutoConfig.for_model(
        kind,
        text_config=text,
        vision_config=seeing,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=kind == "qwen2_5_vl",
    )


def _preprocessing(kind: Kind) -> dict[str, Any]:
    """What the published repository of the kind holds, but for the sizes."""
    common = {
        "patch_size": PATCH[kind],
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    }
    if kind == "qwen2_5_vl":
        special = {"min_pixels": FEWEST, "max_pixels": MOST, "image_processor_type": "Qwen2VLImageProcessor"}
        return {**common, **special, "processor_class": "Qwen2_5_VLProcessor"}
    size = {"longest_edge": MOST, "shortest_edge": FEWEST}
    return {**common, "size": size, "image_processor_type": "Qwen2VLImageProcessorFast"}


def save_vlm(folder: Path, kind: Kind) -> Path:
    """Saves model, tokenizer, preprocessing, and the chat template where the published repository has it."""
    from transformers import AutoModelForImageTextToText

    reader = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(_config(kind, reader))
    model.save_pretrained(folder)
    if kind == "qwen3_vl":
        reader.chat_template = None
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    reader.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessing(kind)))
    return folder
