"""Rewards: pictures and prompts in, one number a picture out."""

from __future__ import annotations

from calibri_lightning.rewards.base import FunctionReward, ModelInfo, Reward, RewardError, RewardFunction
from calibri_lightning.rewards.combine import Features, RewardSet, Scores
from calibri_lightning.rewards.finding import RewardConfig

__all__ = [
    "Features",
    "FunctionReward",
    "ModelInfo",
    "Reward",
    "RewardConfig",
    "RewardError",
    "RewardFunction",
    "RewardSet",
    "Scores",
]
