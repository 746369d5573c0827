"""Folds scales into the weights, once and for all, so that inference needs no hook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calibri_lightning.adapters.lora import remove_lora
from calibri_lightning.calibration.sites import ColumnBlock, PostNormWeight, RowChunk, Site, unwrap
from calibri_lightning.errors import UserError

_FOLDABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def fold(transformer: nn.Module, sites: Sequence[Site], scales: Tensor) -> None:
    """Multiplies each site's scale into its weights, in place: in float32 (or better), then cast back.

    Folding can be undone by folding 1/scale only up to rounding, and not at all where a scale is 0. Detach
    hooks first, or the scales act twice. All sites are checked before the first weight changes.

    Args:
        transformer: The transformer; a LoRA on a folded layer must be merged first.
        sites: Sites of it.
        scales: [sites], finite.

    Raises:
        UserError: If a site has no fold, its weights are quantised, sharded or under a LoRA, or a scale is
            not finite.
    """
    transformer = unwrap(transformer)
    _check_scales(sites, scales)
    check_fold(transformer, sites)
    for site, scale in zip(sites, scales.tolist(), strict=True):
        module, recipe = _target(transformer, site), site.fold
        if isinstance(recipe, ColumnBlock):
            weight = module.get_parameter("weight")
            _multiply(weight.data[:, recipe.start : recipe.stop], scale)
        else:
            n, index = (recipe.n, recipe.index) if isinstance(recipe, RowChunk) else (1, 0)
            scale_rows(module, scale, n, index)


def check_fold(transformer: nn.Module, sites: Sequence[Site], merges_lora: bool = False) -> None:
    """Checks that sites can be folded, before the first weight changes.

    Args:
        transformer: The transformer.
        sites: Sites of it.
        merges_lora: A LoRA that is on it will be merged before the fold.

    Raises:
        UserError: If one has no fold, its weights are quantised, sharded or under a LoRA, or two share their weights.
    """
    without = [site.name for site in sites if site.fold is None]
    if without:
        raise UserError(
            f"{_listed(without)} cannot be folded: no weight of {type(transformer).__name__} carries such a scale "
            "alone. Keep the hooks for this model (load_calibration), which give the same pictures."
        )
    for site in sites:
        _target(transformer, site, merges_lora)
    if len({(site.block, site.fold) for site in sites}) != len(sites):
        raise UserError(
            "Two of the sites fold into the same weights, which would multiply twice. Keep the hooks for these."
        )


def fold_member(
    transformer: nn.Module,
    sites: Sequence[Site],
    scales: Tensor,
    weight: float = 1.0,
    last: Sequence[str] = (),
    merges_lora: bool = False,
) -> None:
    """Makes a calibration of one member part of the weights, for good; one that cannot be leaves all as it is.

    Args:
        transformer: The transformer.
        sites: Sites of it.
        scales: [sites], finite.
        weight: The member's weight, which multiplies the velocity.
        last: Paths of the Linear layers that make the velocity; the weight goes there.
        merges_lora: Merge the LoRA that is on it first.

    Raises:
        UserError: If a site or the weight cannot be folded, or a scale is not finite.
    """
    transformer = unwrap(transformer)
    _check_scales(sites, scales)
    check_fold(transformer, sites, merges_lora)
    for path in last:
        check_foldable(transformer, path, merges_lora)
    if merges_lora:
        remove_lora(transformer, merge=True)
    fold(transformer, sites, scales)
    for path in last:
        scale_rows(transformer.get_submodule(path), weight)


@torch.no_grad()
def scale_rows(module: nn.Module, scale: float, n: int = 1, index: int = 0) -> None:
    """Multiplies a chunk of the rows of a module's weight and bias, in place.

    Args:
        module: A Linear, a convolution or a norm with an affine weight.
        scale: The factor.
        n: Number of equal chunks of the rows.
        index: The chunk to multiply.
    """
    for parameter in (module.weight, getattr(module, "bias", None)):
        if isinstance(parameter, Tensor):
            _multiply(parameter.data.chunk(n, dim=0)[index], scale)


def _multiply(part: Tensor, scale: float) -> None:
    part.copy_(part.to(torch.promote_types(part.dtype, torch.float32)) * scale)


def check_foldable(transformer: nn.Module, path: str, merges_lora: bool = False) -> nn.Module:
    """Returns the module at a path after checking that its weights are plain numbers that may be multiplied.

    Args:
        transformer: The transformer.
        path: Path of the module.
        merges_lora: A LoRA that is on it will be merged before the fold.

    Returns:
        The module; where a LoRA will be merged, the one under it.

    Raises:
        UserError: If the module has no weight, or the weight is quantised, sharded or under a LoRA.
    """
    module = transformer.get_submodule(path)
    if merges_lora and isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.get_submodule("base_layer")
    if hasattr(module, "base_layer"):
        raise UserError(
            f"'{path}' is under a LoRA that is not merged; folding its base weights alone would change the "
            "model. Merge the LoRA first (pipe.fuse_lora() and pipe.unload_lora_weights(), or "
            "merge_and_unload()), then fold."
        )
    weight = getattr(module, "weight", None)
    if weight is None:
        raise UserError(f"'{path}' has no weight to fold a scale into. Keep the hooks for this model.")
    if type(weight) is not nn.Parameter or weight.dtype not in _FOLDABLE:
        kind = f"{type(weight).__name__} of dtype {getattr(weight, 'dtype', None)}"
        raise UserError(
            f"The weight of '{path}' is a {kind}: quantised or sharded. Folding needs whole float weights. Fold before "
            "quantising or sharding, or keep the hooks, which work with both."
        )
    return module


def _target(transformer: nn.Module, site: Site, merges_lora: bool = False) -> nn.Module:
    assert site.fold is not None, "checked for all sites at once"
    inner = site.fold.norm if isinstance(site.fold, PostNormWeight) else site.fold.linear
    return check_foldable(transformer, f"{site.block}.{inner}", merges_lora)


def _check_scales(sites: Sequence[Site], scales: Tensor) -> None:
    if scales.shape != (len(sites),) or not torch.isfinite(scales).all():
        raise UserError(
            f"The scales to fold have shape {tuple(scales.shape)}, for {len(sites)} sites. The rule is one "
            "finite scale a site; fold one member of one candidate at a time."
        )


def _listed(names: Sequence[str]) -> str:
    """Names sites: the first few, and how many more there are."""
    if len(names) == 1:
        return f"Site {names[0]}"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Sites {', '.join(names[:3])}{more}"
