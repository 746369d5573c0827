"""Makes diffusion transformers better after training: scales and a reward, gradient-free or with gradients.

The public names load lazily, so that `import calibri_lightning` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibri_lightning.assembly import CalibrationConfig
    from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Krea2, Lumina2, QwenImage, Stock, ZImage
    from calibri_lightning.calibration import fuse, load_calibration, read_calibration, unload_calibration
    from calibri_lightning.data import PromptData
    from calibri_lightning.errors import UserError
    from calibri_lightning.module import CalibriModule
    from calibri_lightning.sharding.strategy import Sharded
    from calibri_lightning.strategies import CMAES, Alternate, DiffusionNFT, FlowGRPO, PairES, Phase

_HOMES = {
    "Alternate": "strategies",
    "CMAES": "strategies",
    "CalibrationConfig": "assembly",
    "CalibriModule": "module",
    "DiffusionNFT": "strategies",
    "FLUX1": "backbones",
    "FLUX2": "backbones",
    "FlowGRPO": "strategies",
    "Krea2": "backbones",
    "Lumina2": "backbones",
    "PairES": "strategies",
    "Phase": "strategies",
    "PromptData": "data",
    "QwenImage": "backbones",
    "SD3": "backbones",
    "Sharded": "sharding.strategy",
    "Stock": "backbones",
    "UserError": "errors",
    "ZImage": "backbones",
    "fuse": "calibration",
    "load_calibration": "calibration",
    "read_calibration": "calibration",
    "unload_calibration": "calibration",
}

__all__ = [
    "CMAES",
    "FLUX1",
    "FLUX2",
    "SD3",
    "Alternate",
    "CalibrationConfig",
    "CalibriModule",
    "DiffusionNFT",
    "FlowGRPO",
    "Krea2",
    "Lumina2",
    "PairES",
    "Phase",
    "PromptData",
    "QwenImage",
    "Sharded",
    "Stock",
    "UserError",
    "ZImage",
    "fuse",
    "load_calibration",
    "read_calibration",
    "unload_calibration",
]


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'calibri_lightning' has no attribute {name!r}")
    return getattr(import_module(f"calibri_lightning.{_HOMES[name]}"), name)
