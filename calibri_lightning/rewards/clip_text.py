"""Prompts as a CLIP model embeds them, each computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPModel

MAX_KEPT = 4096
"""Embeddings that are kept: 16 MB at a width of 1024."""


class TextEmbeddings:
    """Embeds prompts with the text tower of a CLIP model.

    A prompt is embedded alone, padded to the length that the model reads, and then kept: what it is does not depend on
    the prompts around it nor on what was scored before, bit for bit. The least recently used ones are given up first.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, max_kept: int = MAX_KEPT) -> None:
        """Embeds nothing yet.

        Args:
            model: The model; it may move between calls.
            tokenizer: Its tokenizer.
            max_kept: Embeddings that are kept.
        """
        self._model, self._tokenizer, self._max_kept = model, tokenizer, max_kept
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def max_tokens(self) -> int:
        """Tokens that the model reads, start and end included."""
        return int(self._model.config.text_config.max_position_embeddings)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Finds the texts that the model does not read to their end.

        Args:
            texts: Texts.

        Returns:
            Those of more than `max_tokens` tokens.
        """
        lengths = [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]] if texts else []
        return [text for text, length in zip(texts, lengths, strict=True) if length > self.max_tokens]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts.

        Args:
            texts: N texts.

        Returns:
            float32 [N, D] of length 1, on the model's device.
        """
        return torch.stack([self._embedding(text) for text in texts])

    def _embedding(self, text: str) -> Tensor:
        device = self._model.logit_scale.device
        found = self._kept.get(text)
        if found is None or found.device != device:
            found = self._kept[text] = self._embed(text, device)
        self._kept.move_to_end(text)
        if len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return found

    def _embed(self, text: str, device: torch.device) -> Tensor:
        tokens = self._tokenizer(
            [text], padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(device)
        # get_text_features returns a tensor or a structure, depending on the version of transformers.
        pooled = self._model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return torch.nn.functional.normalize(self._model.text_projection(pooled).float(), dim=-1)[0]
