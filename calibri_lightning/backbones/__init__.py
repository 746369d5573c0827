"""Backbones: one adapter a family of diffusers pipelines, all with the same few methods."""

from __future__ import annotations

from calibri_lightning.backbones.base import Backbone, Conditioning
from calibri_lightning.backbones.sd3 import SD3

__all__ = ["SD3", "Backbone", "Conditioning"]
