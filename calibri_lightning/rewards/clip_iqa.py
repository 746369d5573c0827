"""CLIP-IQA: does a picture look more like a good photo or like a bad one?

Wang et al., arXiv 2207.12396, equations 1 and 2: the cosines of a picture with two opposite texts, and their softmax.
The authors use a ResNet-50 without positional embeddings, which sees pictures at their own size. This is the variant of
torchmetrics for other models: any CLIP of transformers, positional embeddings as they are, the central square at the
model's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibri_lightning.backbones.loading import DType
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.clip_model import ClipReward
from calibri_lightning.rewards.resizing import Resize


class ClipIqa(ClipReward):
    """The probability of the good text; prompts are not read."""

    name = "clip_iqa"

    def __init__(
        self,
        pretrained: str | None = None,
        processor: str | None = None,
        revision: str | None = None,
        dtype: DType = "float32",
        device: str | None = None,
        batch_size: int = 16,
        resize: Resize = "pillow",
        good: str = "Good photo.",
        bad: str = "Bad photo.",
    ) -> None:
        """Loads nothing yet.

        Args:
            pretrained: A folder or a Hub id of a CLIP model of transformers, with safetensors weights.
            processor: A folder or a Hub id of its tokenizer and preprocessing; by default what lies beside the weights.
            revision: Branch, tag or commit of the Hub repository of the weights.
            dtype: Type of weights and activations: float32, or bfloat16 with half the memory and noisier scores.
            device: Where to score; by default where the pictures are.
            batch_size: Pictures of one forward.
            resize: Who brings pictures to the model's size: pillow, to the bits of published scores, or torch, which
                leaves them on their device.
            good: The text of what is wanted; others than the default ask for other things, for instance "Sharp photo.".
            bad: The text of its opposite, for instance "Blurry photo.".

        Raises:
            UserError: If dtype, device, batch_size or resize is none, or the two texts are the same.
        """
        super().__init__(pretrained, processor, revision, dtype, device, batch_size, resize)
        if not good or not bad or good == bad:
            raise UserError(
                f"good and bad of the reward 'clip_iqa' are {good!r} and {bad!r}; they must be two texts that say the "
                "opposite, for instance good: Sharp photo., bad: Blurry photo."
            )
        self._pair = (good, bad)

    def _score(self, seen: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = self._scorer.texts
        assert texts is not None
        scale = self._scorer.model.logit_scale.float().exp()
        return torch.softmax(scale * (seen @ texts(self._pair).T), dim=-1)[:, 0]
