"""What scales do inside of a block: they are linear, they leave nothing out, and they do what their names say.

Within a block, attention comes first, cross-attention feeds on it and the MLP on both; and what is added to one
stream reaches the other one in the next block only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from site_models import CASES, Case, Tiny
from site_models.base import BATCH
from torch import Tensor, nn

from calibri_lightning.calibration import Attachment, Site, SiteOptions, attach, find_sites

MLPS = ("ff", "ff_context", "img_mlp", "txt_mlp", "mlp", "feed_forward", "ffn", "gate_proj", "block.ff_i", "block.ff_t")
CROSS = ("attn2", "cross_attention")
PARALLEL = ("Flux3ModeTransformerBlock", "Flux3SingleTransformerBlock")
"""Here the MLP does not feed on the attention; the site is the module of its name."""


class Watch:
    """What goes into the MLPs and cross-attentions of one block, and the streams that it returns."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def put(self, name: str, value: Tensor) -> None:
        self.seen.setdefault(name, []).append(value.detach().clone())

    @contextmanager
    def on(self, block: nn.Module) -> Iterator[None]:
        def entered(kind: str) -> Any:
            return lambda module, args, kwargs: self.put(kind, args[0] if args else kwargs["hidden_states"])

        def left(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, tuple):
                given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
                length = {
                    given[a].shape[1]: s for a, s in (("hidden_states", "image"), ("encoder_hidden_states", "text"))
                }
                assert len(length) == 2
                for stream in output:
                    if stream is not None:  # SD3's last block drops the text
                        self.put(length[stream.shape[1]], stream)

        children = dict(block.named_modules())
        handles = [
            children[name].register_forward_pre_hook(entered(kind), with_kwargs=True)
            for kind, names in (("mlp", MLPS), ("xattn", CROSS))
            for name in names
            if name in children
        ]
        handles.append(block.register_forward_hook(left, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def changed(before: Watch, after: Watch) -> set[str]:
    assert before.seen.keys() == after.seen.keys()
    return {
        name
        for name, tensors in before.seen.items()
        if not all(torch.equal(a, b) for a, b in zip(tensors, after.seen[name], strict=True))
    }


def expected(site: Site, layers: set[str]) -> set[str]:
    """What must change in the block of a site."""
    names = set() if site.layer == "mlp" else {"mlp"}
    return names | ({"xattn"} if site.layer == "attn" and "xattn" in layers else set())


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@torch.no_grad()
def test_a_site_scales_the_branch_and_the_stream_of_its_name(case: Case) -> None:
    tiny = case.tiny()
    attachment = attach(tiny.transformer, find_sites(tiny.transformer, case.options))
    try:
        for column, site in enumerate(attachment.sites):
            block = tiny.transformer.get_submodule(site.block)
            if site.choice == "split" or type(block).__name__ in PARALLEL:
                continue
            runs = []
            for scale in (1.0, 3.0):
                scales = torch.ones(BATCH, len(attachment.sites))
                scales[:, column] = scale
                watch = Watch()
                with attachment.rows(scales), watch.on(block):
                    tiny()
                runs.append(watch)
            layers = {other.layer for other in attachment.sites if other.block == site.block}
            found = changed(*runs)
            assert found & ({"mlp", "xattn"} if "xattn" in layers else {"mlp"}) == expected(site, layers), site.name
            if {"image", "text"} <= runs[0].seen.keys():
                assert found & {"image", "text"} == {site.stream}, site.name
    finally:
        attachment.detach()


def through(
    tiny: Tiny, attachment: Attachment, block: str, scales: dict[int, float]
) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into a block and what comes out, with all scales of the block 0 but these columns."""
    given: list[Tensor] = []
    returned: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given.extend(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        outputs = output if isinstance(output, tuple) else (output,)
        returned.extend(value for value in outputs if value is not None)

    rows = torch.ones(BATCH, len(attachment.sites))
    for column, site in enumerate(attachment.sites):
        if site.block == block:
            rows[:, column] = scales.get(column, 0.0)
    handle = tiny.transformer.get_submodule(block).register_forward_hook(hook, with_kwargs=True)
    with attachment.rows(rows):
        tiny()
    handle.remove()
    return given, returned


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@torch.no_grad()
def test_a_block_is_linear_in_the_scale_of_its_only_branch(case: Case) -> None:
    # A scale in front of a norm, where the norm undoes it, is what this finds.
    tiny = case.tiny()
    attachment = attach(tiny.transformer, find_sites(tiny.transformer, case.options))
    try:
        for column, site in enumerate(attachment.sites):
            if case.name == "auraflow" and site.layer == "attn":
                continue  # it acts through the MLP
            at = [through(tiny, attachment, site.block, {column: scale})[1] for scale in (0.0, 1.0, 2.0)]
            steps = [torch.cat([(b - a).flatten() for a, b in zip(*pair, strict=True)]) for pair in (at[:2], at[1:])]
            assert steps[0].norm() > 1e-2, site.name
            assert torch.allclose(steps[0], steps[1], atol=1e-5 * float(at[1][0].abs().max())), site.name
    finally:
        attachment.detach()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@torch.no_grad()
def test_a_block_whose_scales_are_0_is_the_identity(case: Case) -> None:
    # No branch is forgotten. (Halves of a fused block leave the bias of their projection, so take it whole.)
    tiny = case.tiny()
    options = SiteOptions(cross_attention=case.options.cross_attention)
    attachment = attach(tiny.transformer, find_sites(tiny.transformer, options))
    try:
        for block in dict.fromkeys(site.block for site in attachment.sites):
            if getattr(tiny.transformer.get_submodule(block), "skip_linear", None) is not None:
                continue  # HunyuanDiT's later blocks mix in an earlier one first
            given, returned = through(tiny, attachment, block, {})
            for output in returned:
                assert any(torch.equal(output, value) for value in given if value.shape == output.shape), block
    finally:
        attachment.detach()
