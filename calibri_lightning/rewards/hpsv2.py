"""HPSv2.1: which picture do people prefer?

Wu et al., arXiv 2306.09341. A CLIP ViT-H/14 that was tuned on choices between pictures; published as weights of
open_clip. A score is the cosine of the embeddings of picture and prompt, for pictures of today's models 0.20 to 0.33.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.backbones.loading import DType
from calibri_lightning.rewards.base import ModelInfo
from calibri_lightning.rewards.clip_model import PromptClipReward
from calibri_lightning.rewards.loading import commit_of, find_file, name_of, read_tensors
from calibri_lightning.rewards.open_clip_keys import load_open_clip
from calibri_lightning.rewards.resizing import fit_longest_side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PUBLISHED = "xswu/HPSv2"
"""The published weights; of both versions."""
FILE = "HPS_v2.1_compressed.pt"
PUBLISHED_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The model that was tuned; its tokenizer is that of all CLIP models."""

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class HpsV2(PromptClipReward):
    """The cosine of picture and prompt, without the model's temperature."""

    name = "hpsv2"
    _kind = "file or folder"

    def __init__(
        self,
        pretrained: str = PUBLISHED,
        file: str = FILE,
        processor: str = PUBLISHED_TOKENIZER,
        revision: str | None = None,
        dtype: DType = "float32",
        device: str | None = None,
        batch_size: int = 16,
    ) -> None:
        """Loads nothing yet.

        Args:
            pretrained: Weights of an open_clip ViT-H-14: a file, a folder or a Hub id.
            file: The file in that folder or repository: a .pt of tensors only, or safetensors. HPS_v2_compressed.pt is
                version 2.0, whose scores are other ones.
            processor: A folder or a Hub id of the tokenizer.
            revision: Branch, tag or commit of the Hub repository of the weights.
            dtype: Type of weights and activations: float32, or bfloat16 with half the memory and noisier scores.
            device: Where to score; by default where the pictures are.
            batch_size: Pictures of one forward.

        Raises:
            UserError: If dtype, device or batch_size is none.
        """
        super().__init__(pretrained, processor, revision, dtype, device, batch_size)
        self._file = file

    def describe(self) -> ModelInfo:
        """Says what gives the scores; loads the model.

        Returns:
            The file, its commit if it comes from the Hub, and how a picture is brought to its size.

        Raises:
            UserError: If the model cannot be loaded.
        """
        self.check(())
        name = name_of(self._pretrained)
        return ModelInfo(
            name if name == self._file else f"{name}/{self._file}",
            commit_of(self._pretrained, self._revision, self._file),
            self._preprocessing_name(),
        )

    def _load_model(self, place: str) -> PreTrainedModel:
        return load_open_clip(read_tensors(find_file(place, self._file, self._revision)), self._dtype)

    def _load_image_processor(self) -> None:
        """It has its own."""

    def _preprocess(self, images: Tensor, device: torch.device) -> Tensor:
        size = self._scorer.model.config.vision_config.image_size
        return fit_longest_side(images.to(device), size, _MEAN, _STD)

    def _preprocessing_name(self) -> str:
        return f"torch-longest-side-pad-{self._scorer.model.config.vision_config.image_size}"
