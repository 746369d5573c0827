"""PickScore: which picture would people pick for this prompt?

Kirstain et al., arXiv 2305.01569. A CLIP ViT-H/14 that was tuned on choices between pictures. A score is 100 times
the cosine of the embeddings of picture and prompt; for pictures of today's models some 20 to 24.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from calibri_lightning.backbones.loading import DType, first_line, torch_dtype
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import Reward
from calibri_lightning.rewards.pixels import to_pixels

if TYPE_CHECKING:
    from transformers import CLIPModel

PUBLISHED = "yuvalkirstain/PickScore_v1"
"""The published weights."""
PUBLISHED_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Tokenizer and preprocessing that their authors use with them."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_log = logging.getLogger(__name__)
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class _Scorer:
    """What is loaded once."""

    model: CLIPModel
    tokenizer: Any
    image_processor: Any

    @property
    def max_tokens(self) -> int:
        """Tokens that the text encoder reads, start and end included."""
        return int(self.model.config.text_config.max_position_embeddings)


class PickScore(Reward):
    """Scores pictures by their prompts with a CLIP model, in this process.

    The model is loaded on the CPU when a run checks its prompts, so that a missing one is found before any work, and
    moves to the device of the first pictures.
    """

    name = "pickscore"
    pixels = "uint8"

    def __init__(
        self,
        pretrained: str = PUBLISHED,
        processor: str | None = None,
        revision: str | None = None,
        dtype: DType = "float32",
        device: str | None = None,
        batch_size: int = 16,
    ) -> None:
        """Loads nothing yet.

        Args:
            pretrained: A folder or a Hub id of a CLIP model of transformers, with safetensors weights.
            processor: A folder or a Hub id of its tokenizer and preprocessing; by default its authors' choice for the
                published weights, and what lies beside them for others.
            revision: Branch, tag or commit of the Hub repository of the weights.
            dtype: Type of weights and activations: float32, or bfloat16 with half the memory and noisier scores.
            device: Where to score; by default where the pictures are.
            batch_size: Pictures of one forward.

        Raises:
            UserError: If dtype, device or batch_size is none.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size of the reward 'pickscore' is {batch_size!r}; it must be a number from 1 up.")
        try:
            self._device = None if device is None else torch.device(device)
        except RuntimeError as error:
            raise UserError(
                f"device of the reward 'pickscore' is {device!r} ({first_line(error)}). Use cpu, cuda or cuda:1, or "
                "leave it out to score where the pictures are."
            ) from error
        beside = PUBLISHED_PROCESSOR if pretrained == PUBLISHED else pretrained
        self._pretrained, self._processor, self._revision = pretrained, processor or beside, revision
        self._dtype, self._batch_size = torch_dtype(dtype), batch_size
        self._measured: set[str] = set()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Loads the model, and says once which prompts it cannot read to their end.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If the model cannot be loaded.
        """
        scorer = self._scorer
        texts = [text for text in dict.fromkeys(prompt.text for prompt in prompts) if text not in self._measured]
        self._measured.update(texts)
        lengths = [len(ids) for ids in scorer.tokenizer(texts, verbose=False)["input_ids"]] if texts else []
        cut = [text for text, length in zip(texts, lengths, strict=True) if length > scorer.max_tokens]
        if cut:
            _log.warning(
                "pickscore reads the first %d tokens of a prompt: %d of %d go on after that, for instance %r.",
                scorer.max_tokens,
                len(cut),
                len(texts),
                cut[0],
            )

    def prepare(self, device: torch.device) -> None:
        """Moves the model to its device.

        Args:
            device: Where pictures will be.
        """
        self._scorer.model.to(self._device or device)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1; their centre is seen, a square.
            prompts: The prompt of each picture.

        Returns:
            float32 [B], 100 times a cosine.

        Raises:
            UserError: If the model cannot be loaded.
        """
        self.check(prompts)
        device = self._device or images.device
        self._scorer.model.to(device)
        texts = [prompt.text for prompt in prompts]
        parts = [slice(start, start + self._batch_size) for start in range(0, len(images), self._batch_size)]
        with torch.inference_mode():
            return torch.cat([self._score(images[part], texts[part], device) for part in parts])

    def _score(self, images: Tensor, texts: Sequence[str], device: torch.device) -> Tensor:
        scorer = self._scorer
        distinct = list(dict.fromkeys(texts))
        # Always as long as the model reads: a text's embedding does not depend on the texts around it.
        tokens = scorer.tokenizer(
            distinct, padding="max_length", truncation=True, max_length=scorer.max_tokens, return_tensors="pt"
        ).to(device)
        pixels = scorer.image_processor(list(to_pixels(images)), return_tensors="pt")["pixel_values"]
        # One call of the whole model: what its halves return has changed between versions of transformers.
        answer = scorer.model(**tokens, pixel_values=pixels.to(device, self._dtype))
        text = answer.text_embeds.float()[[distinct.index(text) for text in texts]]
        cosines = (answer.image_embeds.float() * text).sum(dim=-1)
        return scorer.model.logit_scale.float().exp() * cosines

    @cached_property
    def _scorer(self) -> _Scorer:
        from transformers import AutoImageProcessor, AutoTokenizer

        # Pillow's preprocessing, whether or not torchvision is installed: scores must not depend on that.
        return _Scorer(
            self._fetch("weights", self._pretrained, self._load_model),
            self._fetch("tokenizer", self._processor, AutoTokenizer.from_pretrained),
            self._fetch(
                "preprocessing", self._processor, lambda name: AutoImageProcessor.from_pretrained(name, backend="pil")
            ),
        )

    def _load_model(self, name: str) -> CLIPModel:
        from transformers import CLIPModel

        model, report = CLIPModel.from_pretrained(
            name, revision=self._revision, dtype=self._dtype, use_safetensors=True, output_loading_info=True
        )
        wrong = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        if wrong:
            raise ValueError(f"no CLIP model, or an incomplete one: {len(wrong)} tensors are absent, {wrong[0]} first")
        made: CLIPModel = model.requires_grad_(False).eval()
        return made

    def _fetch(self, what: str, name: str, load: Callable[[str], _Part]) -> _Part:
        fix = (
            "With the network at hand, nothing needs to be set; without it, download the repository and give its "
            "folder: rewards: {pickscore: {weight: 1.0, options: {pretrained: FOLDER}}}."
        )
        if not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
            raise UserError(
                f"The {what} of the reward 'pickscore' cannot be found: {name!r} is neither an existing folder nor a "
                f"Hub id 'owner/name'. {fix}"
            )
        try:
            return load(name)
        # The Hub client, safetensors and transformers raise dozens of unrelated classes.
        except Exception as error:
            raise UserError(
                f"The {what} of the reward 'pickscore' could not be loaded from {name!r} ({first_line(error)}). {fix}"
            ) from error
