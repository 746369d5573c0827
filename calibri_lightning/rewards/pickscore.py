"""PickScore: which picture would people pick for this prompt?

Kirstain et al., arXiv 2305.01569. A CLIP ViT-H/14 that was tuned on choices between pictures. A score is 100 times
the cosine of the embeddings of picture and prompt; for pictures of today's models some 20 to 24.
"""

from __future__ import annotations

from torch import Tensor

from calibri_lightning.backbones.loading import DType
from calibri_lightning.rewards.clip_model import PromptClipReward
from calibri_lightning.rewards.resizing import Resize

PUBLISHED = "yuvalkirstain/PickScore_v1"
"""The published weights."""
PUBLISHED_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Tokenizer and preprocessing that their authors use with them."""


class PickScore(PromptClipReward):
    """The cosine of picture and prompt times the model's temperature, 100."""

    name = "pickscore"

    def __init__(
        self,
        pretrained: str = PUBLISHED,
        processor: str | None = None,
        revision: str | None = None,
        dtype: DType = "float32",
        device: str | None = None,
        batch_size: int = 16,
        resize: Resize = "pillow",
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
            resize: Who brings pictures to the model's size: pillow, to the bits of published scores, or torch, which
                leaves them on their device.

        Raises:
            UserError: If dtype, device, batch_size or resize is none.
        """
        beside = PUBLISHED_PROCESSOR if pretrained == PUBLISHED else pretrained
        super().__init__(pretrained, processor or beside, revision, dtype, device, batch_size, resize)

    def _scale(self) -> Tensor:
        scale: Tensor = self._scorer.model.logit_scale.float().exp()
        return scale
