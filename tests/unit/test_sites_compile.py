"""Every kind of hook under torch.compile: blocks of a kind share their graphs, and new scales need none."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from site_models import CASES, Tiny
from torch._dynamo.testing import CompileCounter

from calibri_lightning.calibration import attach, find_sites
from calibri_lightning.calibration.sites import ArgumentChunk


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_blocks(tiny: Tiny, blocks: list[str]) -> CompileCounter:
    counter = CompileCounter()
    for block in blocks:
        tiny.transformer.get_submodule(block).compile(backend=counter, fullgraph=True)
    return counter


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("name", ["flux1", "flux2", "wan", "ernie_image", "qwen_image_edit", "prx"])
@torch.no_grad()
def test_blocks_share_graphs_and_new_scales_need_none(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    bare, tiny = copy.deepcopy(case.tiny()), copy.deepcopy(case.tiny())
    sites = find_sites(tiny.transformer, case.options)
    blocks = list(dict.fromkeys(site.block for site in sites))
    attachment = attach(tiny.transformer, sites)
    scales = torch.linspace(0.5, 1.5, 3 * len(sites)).view(3, -1)
    with attachment.rows(scales):
        eager = tiny()
    without = compile_blocks(bare, blocks)
    bare()
    torch._dynamo.reset()
    counter = compile_blocks(tiny, blocks)
    attachment.set_rows(scales)
    assert torch.allclose(tiny(), eager, atol=1e-5)
    # A hook on the compiled module itself, as for arguments, is a graph of its own: one for all blocks of a kind.
    own = {type(tiny.transformer.get_submodule(s.block)).__name__ for s in sites if isinstance(s.hook, ArgumentChunk)}
    graphs = without.frame_count + len(own)
    assert counter.frame_count == graphs < len(blocks) * (2 if own else 1)
    attachment.set_rows(scales.flip(1))
    assert not torch.allclose(tiny(), eager, atol=1e-3)
    assert counter.frame_count == graphs
