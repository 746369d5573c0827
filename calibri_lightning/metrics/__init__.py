"""Rewards and distances of pictures as torchmetrics, for other people's loops.

This package's own validation and test do not use them: they reduce in a fixed order of their own.
"""

from __future__ import annotations

from calibri_lightning.metrics.change import PictureChange
from calibri_lightning.metrics.distances import KernelDistance, frechet_distance
from calibri_lightning.metrics.networks import FeatureNetwork
from calibri_lightning.metrics.reward import RewardMetric

__all__ = ["FeatureNetwork", "KernelDistance", "PictureChange", "RewardMetric", "frechet_distance"]
