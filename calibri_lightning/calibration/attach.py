"""Hooks that scale the sites of a live transformer, each row of the batch by its own scales.

One persistent hook per hooked module reads a plain tensor attribute of that module, [B, k]. It is a plain
attribute because DistributedDataParallel overwrites buffers with those of rank 0 and `.to(bfloat16)` would
round them. Hooks of modules of one kind are one and the same function, so that `torch.compile` shares one
graph between all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibri_lightning.calibration.hooks import ROWS, install
from calibri_lightning.calibration.sites import (
    ArgumentChunk,
    Hook,
    Site,
    WholeOutput,
    unwrap,
)
from calibri_lightning.errors import UserError


class Attachment:
    """The hooks on one transformer. Made by `attach`."""

    def __init__(self, transformer: nn.Module, sites: tuple[Site, ...]) -> None:
        """Installs the hooks; use `attach`, which checks first.

        Args:
            transformer: The transformer.
            sites: Its sites to scale, each at most once.
        """
        self.sites = sites
        self._transformer = transformer
        self._points = _group(transformer, sites)
        self._handles = [install(point.module, point.hooks) for point in self._points]
        order = [column for point in self._points for column in point.columns]
        self._order = None if order == sorted(order) else torch.tensor(order)

    def set_rows(self, scales: Tensor | None) -> None:
        """Sets the scales of the forwards that follow.

        Args:
            scales: float32 (or float64) [B, sites], B the batch size of the forwards; gradients flow into it.
                None leaves the transformer as it is without hooks.

        Raises:
            UserError: If the shape or dtype is wrong, or a hooked module was replaced since `attach`.
        """
        if scales is None:
            for point in self._points:
                setattr(point.module, ROWS, None)
            return
        self._check(scales)
        device = next(self._transformer.parameters()).device
        # Offloaded parameters may be on the meta device; the hooks then move the rows themselves.
        scales = scales if device.type == "meta" else scales.to(device)
        ordered = scales if self._order is None else scales[:, self._order.to(scales.device)]
        pieces = ordered.split([len(point.columns) for point in self._points], dim=1)
        for point, piece in zip(self._points, pieces, strict=True):
            # A fresh tensor each: a view's strides are part of what a compiled graph is specialised on.
            setattr(point.module, ROWS, piece.clone(memory_format=torch.contiguous_format))

    def _check(self, scales: Tensor) -> None:
        if scales.ndim != 2 or scales.shape[1] != len(self.sites):
            raise UserError(
                f"The scales have shape {tuple(scales.shape)}. The rule is [rows of the batch, "
                f"{len(self.sites)}], one column a site of this attachment; attach again after dropping "
                "sites."
            )
        if scales.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"The scales have dtype {scales.dtype}, which keeps too few digits. Give float32 or float64."
            )
        for point in self._points:
            if point.current(self._transformer) is not point.module:
                raise UserError(
                    f"'{point.path}' was replaced after the hooks were attached, so they no longer act (a "
                    "LoRA added later does this). Call detach() and attach again after the change."
                )

    @contextmanager
    def rows(self, scales: Tensor | None) -> Iterator[None]:
        """Sets the scales for the forwards inside a `with`, and none after it.

        Args:
            scales: As for `set_rows`.

        Yields:
            Nothing.
        """
        self.set_rows(scales)
        try:
            yield
        finally:
            self.set_rows(None)

    def detach(self) -> None:
        """Removes the hooks and everything they left; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for point in self._points:
            if hasattr(point.module, ROWS):
                delattr(point.module, ROWS)
        self._handles, self._points = [], []


def attach(transformer: nn.Module, sites: tuple[Site, ...]) -> Attachment:
    """Installs the hooks of some sites, once and for good; scales of 1 change no bit of any output.

    Attach before the first compiled call: `torch.compile` silently ignores hooks that come later. A LoRA may
    be added before or after.

    Args:
        transformer: The transformer; a `PeftModel` is unwrapped.
        sites: Sites of it, from `find_sites`.

    Returns:
        The attachment, with all scales unset.

    Raises:
        UserError: If hooks are attached already, the transformer is compiled, or a site is not of this
            transformer.
    """
    compiled = [name for name, module in transformer.named_modules() if _is_compiled(module)]
    if compiled:
        raise UserError(
            f"The transformer is compiled already (at '{compiled[0] or type(transformer).__name__}'). "
            "torch.compile silently ignores hooks added after its first call. Attach the calibration first "
            "and compile afterwards."
        )
    transformer = unwrap(transformer)
    if any(hasattr(module, ROWS) for module in transformer.modules()):
        raise UserError(
            f"This {type(transformer).__name__} has calibration hooks already; a second set would multiply "
            "with the first. Call detach() on the first attachment (or unload_calibration(pipe)) before "
            "attaching again."
        )
    if len(set(sites)) != len(sites):
        raise UserError(
            "A site is listed twice. Each site is attached once; take the sites from find_sites(transformer)."
        )
    return Attachment(transformer, tuple(sites))


PROBE_FACTORS = (3.0, 300.0)
"""What the probe multiplies a site by; the second one only where the first changed nothing."""


@torch.no_grad()
def probe(attachment: Attachment, forward: Callable[[], Tensor]) -> tuple[Site, ...]:
    """Finds sites that do nothing: x3 on a site must change the output, be it by one bit, or else x300.

    Each row of the batch tries another site, so the transformer runs once for every B sites, and once more for those
    whose x3 changed nothing: bfloat16 rounds away what a small site adds to a large sum. Drop what is found, then
    attach the remaining sites afresh.

    Args:
        attachment: The hooks to probe; their rows are unset afterwards.
        forward: Runs the transformer on a fixed batch and returns an output with the batch's B rows.

    Returns:
        The dead sites.

    Raises:
        UserError: If the untouched output is not finite, so that nothing can be compared.
    """
    with attachment.rows(None):
        batch = len(forward())
    num_sites = len(attachment.sites)
    ones = torch.ones(batch, num_sites)
    with attachment.rows(ones):
        untouched = forward().clone()
    if not torch.isfinite(untouched).all():
        raise UserError(
            "The untouched transformer returned NaN or infinity, so no site can be probed. Check the "
            "checkpoint and the dtype (float16 overflows in many transformers; use bfloat16 or float32)."
        )
    silent = list(range(num_sites))
    for factor in PROBE_FACTORS:
        tried, silent = silent, []
        for first in range(0, len(tried), batch):
            some = tried[first : first + batch]
            scales = ones.clone()
            scales[range(len(some)), some] = factor
            with attachment.rows(scales):
                output = forward()
            silent += [site for row, site in enumerate(some) if torch.equal(output[row], untouched[row])]
    return tuple(attachment.sites[site] for site in silent)


@dataclass(frozen=True)
class _Point:
    """One hook: a module, the way it is scaled and the columns of the scales that it reads."""

    path: str
    module: nn.Module
    hooks: tuple[Hook, ...]
    columns: tuple[int, ...]

    def current(self, transformer: nn.Module) -> nn.Module:
        return transformer.get_submodule(self.path)


def _group(transformer: nn.Module, sites: tuple[Site, ...]) -> list[_Point]:
    """Groups sites by the module that is hooked for them, in the order of the sites."""
    groups: dict[str, list[int]] = {}
    for column, site in enumerate(sites):
        inner = "" if isinstance(site.hook, ArgumentChunk) else site.hook.module
        groups.setdefault(f"{site.block}.{inner}" if inner else site.block, []).append(column)
    points = []
    for path, columns in groups.items():
        try:
            module = transformer.get_submodule(path)
        except AttributeError as error:
            raise UserError(
                f"{type(transformer).__name__} has no module '{path}', which site {sites[columns[0]].name} "
                "hooks. The sites must be those of this transformer: take them from find_sites(transformer)."
            ) from error
        hooks = tuple(sites[c].hook for c in columns)
        if len({type(hook) for hook in hooks}) > 1 or (isinstance(hooks[0], WholeOutput) and len(hooks) > 1):
            raise UserError(
                f"The sites {', '.join(sites[c].name for c in columns)} scale '{path}' in ways that exclude "
                f"each other: {hooks}. One module is hooked in one way. Correct the rows of its block class "
                "in calibration/tables."
            )
        points.append(_Point(path, module, hooks, tuple(columns)))
    return points


def _is_compiled(module: nn.Module) -> bool:
    # nn.Module.compile() sets _compiled_call_impl; torch.compile(module) wraps it in an OptimizedModule.
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
