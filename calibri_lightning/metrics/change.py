"""How much pictures have changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from calibri_lightning.errors import UserError
from calibri_lightning.metrics.mean import FiniteMean
from calibri_lightning.metrics.pictures import to_float

_WINDOW = 11
"""Side of the Gaussian window of SSIM in pixels (Wang et al., 2004: sigma 1.5, 11 x 11)."""


class PictureChange(FiniteMean):
    """Mean structural similarity (SSIM) of pictures to those of another model for the same prompts and noise.

    1 where nothing has changed. Neither more nor less of it is better: a calibration that improves pictures changes
    them, and one that changes all is another model.
    """

    def __init__(self, **kwargs: Any) -> None:
        """Starts at nothing.

        Args:
            **kwargs: Settings of every metric of torchmetrics.
        """
        super().__init__(1, **kwargs)

    def update(self, images: Tensor, base: Tensor) -> None:
        """Compares pictures.

        Args:
            images: [B, 3, H, W], uint8 or floating point in 0..1.
            base: The other model's, in the same order and of the same size.

        Raises:
            UserError: If they are no pictures, or do not belong together.
        """
        if images.shape != base.shape:
            raise UserError(
                f"The pictures are {list(images.shape)} and those of the base {list(base.shape)}; each picture needs "
                "the one of the same prompt and noise, of the same size."
            )
        if min(images.shape[-2:]) < _WINDOW:
            raise UserError(
                f"The pictures are {list(images.shape)}; SSIM looks through a window of {_WINDOW} pixels and needs "
                f"pictures of {_WINDOW} x {_WINDOW} and more."
            )
        if len(images):
            values = structural_similarity_index_measure(
                to_float(images), to_float(base), reduction="none", data_range=1.0
            )
            assert isinstance(values, Tensor)
            self.add_rows(values.reshape(-1, 1))

    def compute(self) -> Tensor:
        """Gives the mean over all pictures of all ranks.

        Returns:
            float32; NaN if there was none that could be compared.
        """
        return self.means()[0]
