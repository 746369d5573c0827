"""Loads a vision-language model of the Qwen-VL kind, or says in one sentence why it cannot be loaded.

With `AutoModelForImageTextToText`, a tokenizer and an image processor, not with `AutoProcessor`: that one also makes a
video processor, which needs torchvision, and its image processor gives other pixels with torchvision than without. Here
Pillow resizes, whatever is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from calibri_lightning.errors import UserError
from calibri_lightning.rewards.loading import load_part

PUBLISHED = "Qwen/Qwen3-VL-8B-Instruct"
"""The published weights that GenEval 2 asks."""


@dataclass(frozen=True)
class LoadedVlm:
    """A model and what prepares its inputs.

    Attributes:
        model: On the CPU, frozen and in evaluation mode.
        tokenizer: Its tokenizer.
        image_processor: Its preprocessing, by Pillow.
        template: Its chat template, in Jinja.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    template: str

    @property
    def image_token(self) -> str:
        """The token whose embedding is replaced by a part of the picture."""
        return str(self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id))


def load_vlm(reward: str, pretrained: str, revision: str | None, dtype: torch.dtype) -> LoadedVlm:
    """Loads a model.

    Args:
        reward: Name of the reward that asks, for messages.
        pretrained: A folder or a Hub id, with safetensors weights.
        revision: Branch, tag or commit of the Hub repository.
        dtype: Type of weights and activations.

    Returns:
        The model.

    Raises:
        UserError: If it is absent, incomplete, or none of the Qwen-VL kind.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    model = load_part(reward, "weights", pretrained, lambda place: _load_model(place, revision, dtype))
    tokenizer = load_part(
        reward, "tokenizer", pretrained, lambda place: AutoTokenizer.from_pretrained(place, revision=revision)
    )
    image_processor = load_part(
        reward,
        "preprocessing",
        pretrained,
        lambda place: AutoImageProcessor.from_pretrained(place, revision=revision, backend="pil"),
    )
    template = load_part(reward, "chat template", pretrained, lambda place: _load_template(place, revision, tokenizer))
    known = getattr(model.config, "image_token_id", None) is not None
    if not known or not hasattr(image_processor, "merge_size"):
        raise UserError(
            f"The reward {reward!r} cannot use {pretrained!r}, a {type(model).__name__}: it asks models of the Qwen-VL "
            f"kind (Qwen2.5-VL, Qwen3-VL). Give one, for instance {PUBLISHED}."
        )
    return LoadedVlm(model, tokenizer, image_processor, template)


def _load_model(place: str, revision: str | None, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        place, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    wrong = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    if wrong:
        raise ValueError(f"another model, or an incomplete one: {len(wrong)} tensors are absent, {wrong[0]} first")
    return model.requires_grad_(False).eval()


def _load_template(place: str, revision: str | None, tokenizer: Any) -> str:
    from transformers.processing_utils import ProcessorMixin

    # A file of the processor in most repositories, a part of the tokenizer in others.
    config, _ = ProcessorMixin.get_processor_dict(place, revision=revision)
    template = config.get("chat_template") or tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError("there is none; this must be the repository of a model that was tuned for dialogue")
    return template
