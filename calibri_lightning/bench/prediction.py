"""What a generation would take on GPUs that nobody here had: counted arithmetic, assumed rates, simulated ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calibri_lightning.backbones.native import Native
from calibri_lightning.bench.roofline import flops_per_row
from calibri_lightning.bench.simulation import Cost, Generated, Work, simulate


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted of the machine; none of it was measured by us."""

    peak_flops: float = 989e12
    """FLOP/s of matrix products of a GPU: an H100 SXM in bfloat16, dense, by its data sheet."""
    transformer_share: float = 0.35
    """Share of the peak that forwards of the transformer reach, whatever the size of a unit."""
    decoder_share: float = 0.2
    """Share that the autoencoder reaches: convolutions."""
    reward_seconds: float = 0.03
    """Of one picture, where it is not hidden behind the next unit: resizing on the CPU and a ViT-H."""
    rows_per_forward: int = 16
    """Most rows that fit beside the model in 80 GB at these sizes."""
    cost: Cost = Cost(unit_seconds=0.2)
    """Seconds of a unit besides its pictures (Python, launches, copies), noise, and the network."""


@dataclass(frozen=True)
class PictureCost:
    """What a picture takes."""

    row_flops: float
    """FLOP of a forward of one row."""
    num_rows: int
    """Rows of a picture: members x steps."""
    decoding_flops: float

    def seconds(self, assumed: Assumptions) -> float:
        """Seconds of a picture on one GPU.

        Args:
            assumed: Rates.

        Returns:
            Sampling, decoding and scoring, one after another.
        """
        sampling = self.num_rows * self.row_flops / (assumed.peak_flops * assumed.transformer_share)
        decoding = self.decoding_flops / (assumed.peak_flops * assumed.decoder_share)
        return sampling + decoding + assumed.reward_seconds


def count_picture(backbone: Native, num_members: int, num_steps: int) -> PictureCost:
    """Counts the arithmetic of a picture.

    Args:
        backbone: The model, best a sketch on the meta device.
        num_members: Rows of a picture in a forward.
        num_steps: Sampling steps.

    Returns:
        Its cost.
    """
    # As for a forward: the CPU's fused attention hides its own products from the counter.
    with torch.no_grad(), FlopCounterMode(display=False) as decoding, sdpa_kernel(SDPBackend.MATH):
        backbone.decode(torch.zeros(1, *backbone.latent_shape(), device=backbone.device))
    row = flops_per_row(backbone, 1, backbone.example())
    return PictureCost(row, num_members * num_steps, decoding.get_total_flops())


def predict(
    picture: PictureCost, work: Work, num_members: int, assumed: Assumptions, world_size: int, balance_over: int
) -> Generated:
    """Predicts a generation.

    Args:
        picture: What one takes.
        work: Candidates and prompts; its pictures a unit are those of the assumptions.
        num_members: Rows of a picture in a forward.
        assumed: Rates.
        world_size: GPUs.
        balance_over: As `model.balance_over`.

    Returns:
        What every rank does and how long it takes.
    """
    work = replace(work, pictures_per_unit=assumed.rows_per_forward // num_members)
    cost = replace(assumed.cost, picture_seconds=picture.seconds(assumed))
    return simulate(work, cost, world_size, balance_over)
