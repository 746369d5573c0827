"""Distances between two sets of pictures in the features of any network: torchmetrics' FID and KID."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Not from torchmetrics.image, which offers the two only where torch-fidelity is installed.
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from calibri_lightning.metrics.networks import FeatureNetwork


def frechet_distance(network: FeatureNetwork, **kwargs: Any) -> FrechetInceptionDistance:
    """Makes torchmetrics' FID (Heusel et al., arXiv 1706.08500, equation 6) of a network of your own.

    The values cannot be compared with those of the Inception network, nor of any other one. Covariances need several
    times more pictures than the network has features.

    Args:
        network: Describes pictures.
        **kwargs: Further arguments of `FrechetInceptionDistance`, for instance `reset_real_features`.

    Returns:
        The metric: `update(images, real=True)` and `update(images, real=False)`, uint8 or floating point in 0..1.
    """
    metric = FrechetInceptionDistance(feature=network, **kwargs)
    # torchmetrics 1.9 sets this in `update`, so that `compute` fails on a rank that had no pictures.
    metric.orig_dtype = torch.float32
    return metric


class KernelDistance(KernelInceptionDistance):
    """torchmetrics' KID (Binkowski et al., arXiv 1801.01401, section 4) of a network of your own.

    It differs from its parent in two points: ranks may have different numbers of batches, or none, where the parent
    gathers what does not belong together or waits for ever; and subsets are drawn with a seed of the metric's own, the
    same on all ranks.
    """

    def __init__(
        self, network: FeatureNetwork, subsets: int = 100, subset_size: int = 1000, seed: int = 0, **kwargs: Any
    ) -> None:
        """Starts with no pictures.

        Args:
            network: Describes pictures.
            subsets: How many subsets are drawn; the distance is the mean over them.
            subset_size: Pictures of a subset; at most those of the smaller set.
            seed: Seed of the draws.
            **kwargs: Further arguments of `KernelInceptionDistance`.
        """
        super().__init__(feature=network, subsets=subsets, subset_size=subset_size, **kwargs)
        self._seed, self._num_features = seed, network.num_features
        for name in ("real_features", "fake_features"):
            # Lists that are gathered without being joined first need as many entries on every rank.
            self.add_state(name, [], dist_reduce_fx="cat")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the features of all ranks.

        Args:
            *args: As for every metric.
            **kwargs: As for every metric.
        """
        for name in ("real_features", "fake_features"):
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                setattr(self, name, [torch.zeros(0, self._num_features, device=self.device)])
        super().sync(*args, **kwargs)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Gives the distance of all pictures of all ranks.

        Returns:
            Mean and standard deviation over the subsets.
        """
        # The parent draws from the global generator of the CPU, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            return super().compute()
