"""Backbones: one adapter a family of diffusers pipelines, all with the same few methods."""

from __future__ import annotations

from calibri_lightning.backbones.base import Backbone
from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.flux1 import FLUX1
from calibri_lightning.backbones.flux2 import FLUX2
from calibri_lightning.backbones.krea2 import Krea2
from calibri_lightning.backbones.lumina2 import Lumina2
from calibri_lightning.backbones.qwen_image import QwenImage
from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.backbones.stock import Stock
from calibri_lightning.backbones.z_image import ZImage

__all__ = [
    "FLUX1",
    "FLUX2",
    "SD3",
    "Backbone",
    "Conditioning",
    "Krea2",
    "Lumina2",
    "QwenImage",
    "Stock",
    "ZImage",
]
