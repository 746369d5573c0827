"""PickScore: which picture would people pick for this prompt?

Kirstain et al., arXiv 2305.01569. A CLIP ViT-H/14 that was tuned on choices between pictures. A score is 100 times
the cosine of the embeddings of picture and prompt; for pictures of today's models some 20 to 24.
"""

from __future__ import annotations

from torch import Tensor

from calibri_lightning.rewards.clip_model import PromptClipReward


class PickScore(PromptClipReward):
    """The cosine of picture and prompt times the model's temperature, 100."""

    name = "pickscore"
    published = "yuvalkirstain/PickScore_v1"
    published_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _scale(self) -> Tensor:
        scale: Tensor = self._scorer.model.logit_scale.float().exp()
        return scale
