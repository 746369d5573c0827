"""Tiny backbones of every family, for the tests of roll-outs and replays."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from tiny_families import CASES

from calibri_lightning.backbones.native import Native
from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.calibration.scales import Layout, build_layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.sampling.kernels import CPS, DanceSDE, FlowSDE, Kernel
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

KERNELS: list[Kernel] = [FlowSDE(), DanceSDE(), CPS()]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
FAMILIES = ["sd3", *CASES]
# One of each backbone and of each way to guide: the others differ in the guidance embedding and the schedule alone.
CLASSES = [name for name in FAMILIES if name not in ("flux1-schnell", "krea2-turbo")]
GUIDED = ["sd3", *(name for name, case in CASES.items() if case.guidance)]


@cache
def _pristine() -> SD3:
    return SD3.of(build_pipeline(TINY))


def family(name: str, dtype: torch.dtype = torch.float32) -> Native:
    """A tiny backbone with fresh weights."""
    if name == "sd3":
        pipe, make = copy.deepcopy(_pristine().pipeline), SD3.of
    else:
        case = CASES[name]
        pipe, make = case.pipe(), lambda pipe: case.backbone.of(pipe, *case.size)
    if dtype != torch.float32:
        pipe.transformer.to(dtype)
    return make(pipe)


def layout_of(backbone: Native, members: str = "single") -> Layout:
    return build_layout(find_sites(backbone.transformer), "gate", members, 3.0)
