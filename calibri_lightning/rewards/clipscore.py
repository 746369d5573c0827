"""CLIPScore: how well does a picture fit its prompt?

Hessel et al., arXiv 2104.08718, score 2.5 max(cos, 0) with a CLIP ViT-B/32 and "A photo depicts" before the text. Here
the score is the cosine itself, as tables of today's papers have it; it is not cut at 0, where it would stop telling
pictures apart.
"""

from __future__ import annotations

from calibri_lightning.backbones.loading import DType
from calibri_lightning.rewards.clip_model import OPENAI_LARGE, PromptClipReward
from calibri_lightning.rewards.resizing import Resize


class ClipScore(PromptClipReward):
    """The cosine of picture and prompt."""

    name = "clipscore"

    def __init__(
        self,
        pretrained: str = OPENAI_LARGE,
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
            processor: A folder or a Hub id of its tokenizer and preprocessing; by default what lies beside the weights.
            revision: Branch, tag or commit of the Hub repository of the weights.
            dtype: Type of weights and activations: float32, or bfloat16 with half the memory and noisier scores.
            device: Where to score; by default where the pictures are.
            batch_size: Pictures of one forward.
            resize: Who brings pictures to the model's size: pillow, to the bits of published scores, or torch, which
                leaves them on their device.

        Raises:
            UserError: If dtype, device, batch_size or resize is none.
        """
        super().__init__(pretrained, processor, revision, dtype, device, batch_size, resize)
