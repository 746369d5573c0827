"""What scales cost: a forward with attached and with folded scales, against the plain transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibri_lightning.backbones.native import Native
from calibri_lightning.bench.measure import Spread, interleave
from calibri_lightning.bench.models import twin
from calibri_lightning.calibration import Layout, attach, fold
from calibri_lightning.calibration.sites import PostNormWeight


@dataclass(frozen=True)
class Overhead:
    """Times of single forwards."""

    rows: int
    """Rows of a forward."""
    plain_seconds: float
    """Median of the plain transformer."""
    attached: Spread
    """Time with attached scales over that of the plain transformer, minus 1."""
    folded: Spread
    """The same with folded scales."""


@torch.no_grad()
def measure_overhead(backbone: Native, layout: Layout, rows: int, repeats: int) -> Overhead:
    """Times forwards of three transformers with the same weights, interleaved.

    Args:
        backbone: The model; it stays as it is.
        layout: Its sites.
        rows: Rows of a forward.
        repeats: Forwards of each.

    Returns:
        The overheads.

    Raises:
        UserError: If a site cannot be folded.
    """
    scales = torch.linspace(0.9, 1.1, len(layout.sites))
    attached, folded = twin(backbone), twin(backbone)
    attach(attached.transformer, layout.sites).set_rows(scales.expand(rows, -1))
    _own_weights(folded.transformer, layout)
    fold(folded.transformer, layout.sites, scales)
    x, seen = backbone.noise(range(rows)), backbone.encode([""] * rows)
    sigma = backbone.schedule(2)[1].to(x).expand(rows)

    def forward(model: Native) -> Callable[[], Tensor]:
        return lambda: model.velocity(x, sigma, seen)

    variants = {"plain": forward(backbone), "attached": forward(attached), "folded": forward(folded)}
    timings = interleave(variants, repeats, backbone.device)
    plain = timings["plain"]
    return Overhead(
        rows,
        plain.median,
        _excess(plain.speedup_over(timings["attached"])),
        _excess(plain.speedup_over(timings["folded"])),
    )


def _excess(ratio: Spread) -> Spread:
    return Spread(ratio.median - 1, ratio.low - 1, ratio.high - 1)


def _own_weights(transformer: nn.Module, layout: Layout) -> None:
    """Gives the layers that are folded into weights of their own: those of a twin belong to its model, too."""
    folds = [(site.block, site.fold) for site in layout.sites if site.fold is not None]
    paths = {f"{block}.{f.norm if isinstance(f, PostNormWeight) else f.linear}" for block, f in folds}
    for path in sorted(paths):
        module = transformer.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, copy.deepcopy(parameter))
