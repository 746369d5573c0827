"""Official Calibri checkpoints (v-gen-ai/Calibri at fd44332) to `calibration.json` and back."""

from calibri_lightning.tools.convert.official import OfficialCheckpoint, read_official, write_official
from calibri_lightning.tools.convert.orders import Order, order_of
from calibri_lightning.tools.convert.translate import from_official, to_official

__all__ = [
    "OfficialCheckpoint",
    "Order",
    "from_official",
    "order_of",
    "read_official",
    "to_official",
    "write_official",
]
