"""How different are the samples of one prompt? A reward can rise because they all become the same good picture.

Two numbers, each for one prompt across its samples. The Vendi score says how many different samples there are, 1 to K,
by features whose units say what a difference is. The pixel distance compares thumbnails and knows nothing of objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg, special
from torch import Tensor
from torch.nn import functional

from calibri_lightning.arrays import Floats

Kernel = Callable[[Floats], Floats]
"""Features [N, D] to similarities [N, N]: positive semi-definite, 1 on the diagonal."""

PIXELS = "pixels"
"""Name of the features where no reward has any: thumbnails."""
THUMBNAIL = 16
"""Side of the thumbnails, pixels: composition and colours, whatever the resolution, without noise and texture."""
PIXEL_WIDTH = 0.1
"""Root mean square difference of two thumbnails at which their similarity is exp(-1/2)."""


@dataclass(frozen=True)
class Diversity:
    """How different the samples of one prompt are, for each of P prompts."""

    vendi: tuple[float, ...]
    """Vendi score of each prompt, 1 to `samples`; NaN with fewer than two samples to compare."""
    pixel_distance: tuple[float, ...]
    """Root mean square difference of each prompt's thumbnails, 0 to 1; NaN like `vendi`."""
    samples: int
    """Samples of each prompt."""
    features: str
    """What the Vendi score compares: the reward whose features they are, or `PIXELS`."""

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.vendi)


def rbf(width: float = 1.0) -> Kernel:
    """The Gaussian kernel exp(-|x - y|^2 / (2 width^2)).

    Args:
        width: Distance at which the similarity is exp(-1/2) = 0.61; at three times this it is 0.01.

    Returns:
        The kernel.
    """

    def similarities(features: Floats) -> Floats:
        squared = np.square(features[:, None] - features[None]).sum(axis=-1)
        return np.asarray(np.exp(-squared / (2 * width**2)))

    return similarities


def vendi_score(features: Floats, kernel: Kernel) -> float:
    """The effective number of different samples: exp of the entropy of the eigenvalues of K / N.

    Friedman and Dieng, "The Vendi Score" (arXiv 2210.02410), definition 3.1. It is 1 where all samples are the same, N
    where no two have anything in common, and does not depend on their order.

    Args:
        features: One row a sample [N, D], finite.
        kernel: What makes two samples similar.

    Returns:
        1 to N; NaN without samples.
    """
    if not len(features):
        return math.nan
    eigenvalues = linalg.eigvalsh(kernel(np.asarray(features, dtype=np.float64)) / len(features))
    # Rounding leaves zeros on either side of 0; entr is -x log x, and 0 at 0.
    return float(np.exp(special.entr(np.clip(eigenvalues, 0.0, None)).sum()))


def thumbnails(images: Tensor) -> Tensor:
    """Averages pictures down to `THUMBNAIL` x `THUMBNAIL`.

    Args:
        images: [B, 3, H, W] in 0..1.

    Returns:
        float32 [B, 3 * `THUMBNAIL`^2].
    """
    return functional.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)


def pixel_distance(pictures: Tensor) -> Tensor:
    """Root mean square difference of the pictures of a group, over all pairs and all values.

    By sum_(i<j) |x_i - x_j|^2 = G sum_i |x_i - mean|^2 the mean over the G (G - 1) / 2 pairs is twice the unbiased
    variance: O(G), cheap enough for every training step.

    Args:
        pictures: Groups of G pictures with D values each, [..., G, D]; for instance `thumbnails`.

    Returns:
        float64 [...]; 0 for equal pictures, NaN for groups of one.
    """
    if pictures.shape[-2] < 2:
        return torch.full(pictures.shape[:-2], torch.nan, dtype=torch.float64, device=pictures.device)
    variances: Tensor = pictures.double().var(dim=-2, correction=1)
    return (2 * variances.mean(dim=-1)).sqrt()


def measure_diversity(pictures: Tensor, features: Tensor | None = None, name: str = PIXELS) -> Diversity:
    """Measures each prompt's samples.

    Args:
        pictures: Thumbnails of K samples of P prompts, [P, K, D]; a picture that is not finite is left out.
        features: What describes the samples, [P, K, F], in units in which a distance of 1 is one width of the kernel; a
            sample that is not finite is left out. None describes them by their thumbnails.
        name: Whose features these are.

    Returns:
        The diversity of each prompt.
    """
    if features is None:
        features = pictures / (math.sqrt(pictures.shape[-1]) * PIXEL_WIDTH)
    usable = pictures.isfinite().all(dim=-1) & features.isfinite().all(dim=-1)
    vendi, distance = [], []
    for prompt, mine in enumerate(usable):
        several = int(mine.sum()) > 1
        kept = features[prompt][mine].double().cpu().numpy()
        vendi.append(vendi_score(kept, rbf()) if several else math.nan)
        distance.append(float(pixel_distance(pictures[prompt][mine])))
    return Diversity(tuple(vendi), tuple(distance), pictures.shape[1], name)
