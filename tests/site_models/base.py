"""What a tiny model for the tests of the sites is, and the list of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from calibri_lightning.calibration.sites import SiteOptions

BATCH = 3
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
AXES = (4, 2, 2)
"""Rotary dimensions of a head of 8 for (time, height, width)."""


@dataclass
class Tiny:
    """An untrained model and inputs for it."""

    transformer: nn.Module
    batched: dict[str, Any]
    """Inputs with a row for each sample: tensors [B, ...], lists of B entries, or tuples of these."""
    shared: dict[str, Any]

    def __call__(self, rows: slice = slice(None)) -> Tensor:
        picked = {name: _pick(value, rows) for name, value in self.batched.items()}
        output = self.transformer(**picked, **self.shared, return_dict=False)
        output = output[0] if isinstance(output, tuple) else output
        return torch.stack(output) if isinstance(output, list) else output

    def double(self, keep: tuple[str, ...] = ()) -> Tiny:
        """A copy in float64, but for modules that their model feeds with float32 whatever its dtype."""
        transformer = copy.deepcopy(self.transformer).double()
        for path in keep:
            transformer.get_submodule(path).float()
        return Tiny(transformer, _double(self.batched), _double(self.shared))


def _pick(value: Any, rows: slice) -> Any:
    return tuple(_pick(part, rows) for part in value) if isinstance(value, tuple) else value[rows]


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _double(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_double(part) for part in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class Draw:
    """Random inputs of BATCH rows, and models with random weights; from a local seed."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=self.generator)

    def time(self, factor: float = 1.0) -> Tensor:
        """A time for each row, between 0 and factor."""
        return factor * (0.2 + 0.6 * torch.rand(BATCH, generator=self.generator))

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, (BATCH, *shape), generator=self.generator)

    def tiny(self, name: str, config: dict[str, Any], batched: dict[str, Any], **shared: Any) -> Tiny:
        """Builds a model of a class of diffusers and overwrites every parameter, gates of 0 among them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # buffers and the like; parameters are drawn below
            transformer = getattr(diffusers, name)(**config)
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=self.generator)
            if parameter.ndim > 1:
                parameter.data = noise / (parameter[0].numel() ** 0.5)
            else:
                parameter.data = parameter.data + 0.3 * noise
        return Tiny(transformer.requires_grad_(False).eval(), batched, shared)


@dataclass(frozen=True)
class Case:
    """One model and what is known about it."""

    name: str
    build: Callable[[Draw], Tiny]
    dead: tuple[str, ...]
    """Names of sites that reach no output."""
    options: SiteOptions
    """Options that this model has a use for."""
    float32: tuple[str, ...]
    gradients: bool

    @cache  # noqa: B019 - a few dozen tiny models, wanted by every test
    def tiny(self) -> Tiny:
        """The model, shared between tests: do not change it."""
        return self.build(Draw())

    def double(self) -> Tiny:
        """A copy in float64."""
        return self.tiny().double(self.float32)


CASES: list[Case] = []


def model(
    dead: tuple[str, ...] = (),
    cross_attention: bool = False,
    split_fused: bool = False,
    float32: tuple[str, ...] = (),
    gradients: bool = True,
) -> Callable[[Callable[[Draw], Tiny]], Callable[[Draw], Tiny]]:
    """Adds a builder to the list; its name is that of the model."""

    def decorate(build: Callable[[Draw], Tiny]) -> Callable[[Draw], Tiny]:
        options = SiteOptions(cross_attention, split_fused)
        CASES.append(Case(build.__name__, build, dead, options, float32, gradients))
        return build

    return decorate


def last_text(block: str = "transformer_blocks.1") -> tuple[str, ...]:
    """The text branches of the last block, which only the picture leaves."""
    return f"{block}.attn.text", f"{block}.mlp.text"
