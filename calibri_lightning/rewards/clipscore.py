"""CLIPScore: how well does a picture fit its prompt?

Hessel et al., arXiv 2104.08718, score 2.5 max(cos, 0) with a CLIP ViT-B/32 and "A photo depicts" before the text. Here
the score is the cosine itself, as tables of today's papers have it; it is not cut at 0, where it would stop telling
pictures apart.
"""

from __future__ import annotations

from calibri_lightning.rewards.clip_model import PromptClipReward


class ClipScore(PromptClipReward):
    """The cosine of picture and prompt."""

    name = "clipscore"
