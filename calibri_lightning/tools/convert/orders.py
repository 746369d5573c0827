"""What each entry of an official vector means, in our names.

A vector is a row of segments. Each holds one kind of scales, for member 0, 1, ... in turn, in the order of the blocks;
the members' weights come last. (Source: the official pipelines' `flatten_coefficients`, v-gen-ai/Calibri at fd44332.)

* FLUX, gate: picture streams of double blocks (attention, MLP); their text streams (attention, MLP); single blocks.
* FLUX, layer: double blocks (attention, MLP; both streams share them); single blocks.
* FLUX, block: double blocks; single blocks.
* SD3.5: picture (attention, MLP); text (attention, MLP) of the blocks that have it; second attentions.
* Qwen-Image: of each block the attention's picture and text, then the MLPs' picture and text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from calibri_lightning.calibration import Granularity, Site, find_sites
from calibri_lightning.calibration.scales import scale_name
from calibri_lightning.errors import UserError

Kind = Literal["flux", "sd3", "qwen"]
"""Family of pipelines in the official code."""

_KINDS: Mapping[str, Kind] = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwen",
}
_SINGLE = "single_transformer_blocks."


@dataclass(frozen=True)
class Order:
    """The order of one official vector."""

    kind: Kind
    granularity: Granularity
    num_members: int
    segments: tuple[tuple[str, ...], ...]
    """Names of scales of one member (`Layout.scale_names`), by segment."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all entries, as in `Layout.names` with raw weights."""
        members = range(self.num_members)
        scales = tuple(f"member{m}/{name}" for segment in self.segments for m in members for name in segment)
        return (*scales, *(f"member{m}/weight" for m in members))

    @property
    def shapes(self) -> dict[str, int]:
        """The counts that the official trainer writes beside such a vector."""
        m = self.num_members
        counts = [m * len(segment) for segment in self.segments]
        shapes = {"total": sum(counts) + m, "n_models": m}
        if self.kind == "qwen":
            return {**shapes, "n_blocks": len(self.segments[0]) // 4}
        if self.kind == "sd3":
            blocks = {"n_blocks": len(self.segments[0]) // 2, "n_context": len(self.segments[1]) // 2}
            named = dict(zip(("main", "context", "attn2"), counts, strict=True))
            return {**shapes, **named, **blocks, "n_attn2": len(self.segments[2])}
        keys = ("doubles_main", "doubles_ctx", "singles") if self.granularity == "gate" else ("doubles_main", "singles")
        num_double = len(self.segments[0]) // (1 if self.granularity == "block" else 2)
        named = dict(zip(keys, counts, strict=True))
        return {**shapes, **named, "n_double": num_double, "n_single": len(self.segments[-1])}


def order_of(transformer: nn.Module, granularity: Granularity, num_members: int) -> Order:
    """Finds the official order for a model.

    Args:
        transformer: A FLUX.1, SD3 or Qwen-Image transformer; it may live on the meta device.
        granularity: How scales are shared; the official code has gate alone for SD3 and Qwen-Image.
        num_members: Members.

    Returns:
        The order.

    Raises:
        UserError: If the official code has no such model or granularity.
    """
    kind, sites = kind_of(transformer), find_sites(transformer)
    if kind != "flux" and granularity != "gate":
        raise UserError(
            f"Granularity {granularity} was asked for. Official checkpoints of {type(transformer).__name__} have one "
            "scale a gate. Use --granularity gate, or leave it out."
        )
    grouped: dict[int, list[Site]] = {i: [] for i in range(_num_segments(kind, granularity))}
    for site in sites:
        grouped[_segment(kind, granularity, site)].append(site)
    if kind == "qwen":
        blocks = list(dict.fromkeys(site.block for site in sites))
        grouped[0].sort(
            key=lambda site: (blocks.index(site.block), site.layer, site.stream)
        )  # attn < mlp, image < text
    segments = tuple(tuple(dict.fromkeys(scale_name(s, granularity) for s in grouped[i])) for i in sorted(grouped))
    return Order(kind, granularity, num_members, segments)


def kind_of(transformer: nn.Module) -> Kind:
    """Finds the family of a model in the official code.

    Args:
        transformer: The transformer.

    Returns:
        The family.

    Raises:
        UserError: If the official code has no such model.
    """
    name = type(transformer).__name__
    if name not in _KINDS:
        raise UserError(
            f"The model is a {name}. The official Calibri code knows FLUX.1, Stable Diffusion 3 and 3.5, and "
            f"Qwen-Image: {', '.join(_KINDS)}. Give one of these."
        )
    return _KINDS[name]


def granularity_of(shapes: Mapping[str, int]) -> Granularity:
    """Tells the granularity of an official checkpoint.

    Args:
        shapes: Its shapes.

    Returns:
        Gate for all models but FLUX; there gate with scales of the text stream, else by scales a double block.
    """
    if "doubles_main" not in shapes or "doubles_ctx" in shapes:
        return "gate"
    return "block" if shapes["doubles_main"] == shapes.get("n_models", 0) * shapes.get("n_double", 0) else "layer"


def dead_sites(kind: Kind, sites: Sequence[Site]) -> frozenset[str]:
    """Names of the sites that reach no output, which runs here leave out.

    Args:
        kind: Family.
        sites: The sites.

    Returns:
        Text attention and MLP of Qwen-Image's last block; nothing elsewhere.
    """
    return frozenset(s.name for s in sites if kind == "qwen" and s.block == sites[-1].block and s.stream == "text")


def _num_segments(kind: Kind, granularity: Granularity) -> int:
    return {"flux": 3 if granularity == "gate" else 2, "sd3": 3, "qwen": 1}[kind]


def _segment(kind: Kind, granularity: Granularity, site: Site) -> int:
    if kind == "qwen":
        return 0
    if kind == "sd3":
        return 2 if site.layer == "attn2" else int(site.stream == "text")
    if granularity == "gate":
        return 2 if site.block.startswith(_SINGLE) else int(site.stream == "text")
    return int(site.block.startswith(_SINGLE))
