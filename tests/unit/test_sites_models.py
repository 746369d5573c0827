"""What is true of the sites of every model, on tiny ones: each has an effect, rows are independent, folds are exact."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from site_models import CASES, Case, Tiny
from torch import Tensor

from calibri_lightning.calibration import Attachment, Site, SiteOptions, attach, find_sites, fold, probe
from calibri_lightning.calibration.sites import BLOCKS, DEFAULT_OPTIONS
from calibri_lightning.errors import UserError

VARIANTS = [(case, options) for case in CASES for options in dict.fromkeys((DEFAULT_OPTIONS, case.options))]
EVERY = pytest.mark.parametrize(
    ("case", "options"),
    VARIANTS,
    ids=[case.name + ("" if options == DEFAULT_OPTIONS else "-with-options") for case, options in VARIANTS],
)
pytestmark = pytest.mark.usefixtures("untouched_rng")


@contextmanager
def hooked(tiny: Tiny, options: SiteOptions) -> Iterator[Attachment]:
    attachment = attach(tiny.transformer, find_sites(tiny.transformer, options))
    try:
        yield attachment
    finally:
        attachment.detach()


def draw(rows: int, num_sites: int, low: float, high: float) -> Tensor:
    uniform = torch.rand(rows, num_sites, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return low + (high - low) * uniform


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@EVERY
@torch.no_grad()
def test_every_site_has_an_effect_but_those_known_to_be_dead(case: Case, options: SiteOptions) -> None:
    tiny = case.tiny()
    with hooked(tiny, options) as attachment:
        dead = probe(attachment, tiny)
    assert [site.name for site in dead] == list(case.dead)


@EVERY
@torch.no_grad()
def test_each_row_has_its_own_scales(case: Case, options: SiteOptions) -> None:
    tiny = case.tiny()
    plain = tiny()
    with hooked(tiny, options) as attachment:
        scales = draw(len(plain), len(attachment.sites), -1.0, 2.0).float()
        with attachment.rows(scales):
            together = tiny()
        for b in range(len(plain)):
            with attachment.rows(scales[b : b + 1]):
                alone = tiny(slice(b, b + 1))
            assert relative(together[b : b + 1], alone) < 1e-5
            assert relative(together[b], plain[b]) > 1e-3


@EVERY
@torch.no_grad()
def test_scales_of_one_change_no_bit_and_unhooking_restores_the_model(case: Case, options: SiteOptions) -> None:
    tiny = case.tiny()
    before, attributes = tiny(), {name: set(vars(m)) for name, m in tiny.transformer.named_modules()}
    with hooked(tiny, options) as attachment:
        assert torch.equal(tiny(), before)
        with attachment.rows(torch.ones(len(before), len(attachment.sites))):
            assert torch.equal(tiny(), before)
        with attachment.rows(torch.full((len(before), len(attachment.sites)), 0.5)):
            assert not torch.equal(tiny(), before)
    assert torch.equal(tiny(), before)
    for name, module in tiny.transformer.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@EVERY
@torch.no_grad()
def test_folded_equals_hooked_where_there_is_a_fold(case: Case, options: SiteOptions) -> None:
    tiny = copy.deepcopy(case.tiny())
    sites = find_sites(tiny.transformer, options)
    foldable = tuple(site for site in sites if site.fold is not None)
    for site in set(sites) - set(foldable):
        with pytest.raises(UserError, match=r"cannot be folded.*Keep the hooks"):
            fold(tiny.transformer, [site], torch.tensor([0.5]))
    if not foldable:
        return
    plain = tiny()
    scales = draw(1, len(foldable), -1.0, 2.0)
    attachment = attach(tiny.transformer, foldable)
    with attachment.rows(scales.expand(len(plain), -1).float()):
        by_hooks = tiny()
    attachment.detach()
    fold(tiny.transformer, foldable, scales[0])
    assert relative(tiny(), by_hooks) < 1e-5
    assert relative(plain, by_hooks) > 1e-2


@pytest.mark.parametrize(
    ("case", "options"),
    [pytest.param(*variant, id=f"{variant[0].name}-{i}") for i, variant in enumerate(VARIANTS) if variant[0].gradients],
)
def test_gradients_equal_finite_differences_for_every_kind_of_hook(case: Case, options: SiteOptions) -> None:
    tiny = case.double()
    with torch.no_grad():
        plain = tiny()
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2)).double()
    with hooked(tiny, options) as attachment:
        sites = attachment.sites
        scales = draw(len(plain), len(sites), 0.5, 1.5)

        def loss(values: Tensor) -> Tensor:
            with attachment.rows(values):
                return (tiny() * direction).sum()

        leaf = scales.clone().requires_grad_()
        loss(leaf).backward()
        kinds = {type(site.hook): column for column, site in enumerate(sites) if site.name not in case.dead}
        for column in kinds.values():
            # Five points: many models round to float32 inside, so that small steps measure rounding alone.
            with torch.no_grad():
                moved = {}
                for step in (-2, -1, 1, 2):
                    values = scales.clone()
                    values[0, column] += 0.02 * step
                    moved[step] = loss(values).item()
            difference = (moved[-2] - moved[2] + 8 * (moved[1] - moved[-1])) / (12 * 0.02)
            assert leaf.grad is not None
            assert leaf.grad[0, column].item() == pytest.approx(difference, rel=2e-3, abs=1e-4), sites[column].name


@EVERY
def test_blocks_with_the_same_rows_share_their_hook_functions(case: Case, options: SiteOptions) -> None:
    tiny = case.tiny()
    rows: dict[str, list[Site]] = {}
    with hooked(tiny, options) as attachment:
        for site in attachment.sites:
            rows.setdefault(site.block, []).append(site)
        seen: dict[object, list[object]] = {}
        for block, sites in rows.items():
            module = tiny.transformer.get_submodule(block)
            key = (type(module).__name__, tuple((site.layer, site.stream, site.hook) for site in sites))
            functions = [
                hook for m in module.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
            ]
            assert functions
            # One graph for all of them under torch.compile, which tells functions apart by their identity.
            assert all(a is b for a, b in zip(functions, seen.setdefault(key, functions), strict=True))


@EVERY
def test_no_two_sites_share_a_name_a_hook_or_a_fold(case: Case, options: SiteOptions) -> None:
    sites = find_sites(case.tiny().transformer, options)
    assert len({site.name for site in sites}) == len(sites)
    assert len({(site.block, site.hook) for site in sites}) == len(sites)
    folds = [(site.block, site.fold) for site in sites if site.fold is not None]
    assert len(set(folds)) == len(folds)


def test_sites_come_in_the_order_of_the_blocks() -> None:
    for case in CASES:
        transformer = case.tiny().transformer
        blocks = list(dict.fromkeys(site.block for site in find_sites(transformer)))
        order = [name for name, _ in transformer.named_modules()]
        assert blocks == sorted(blocks, key=order.index)


def test_every_class_of_the_table_is_in_a_tiny_model_with_each_of_its_options() -> None:
    tried, choices = set(), set()
    for case in CASES:
        transformer = case.tiny().transformer
        for site in find_sites(transformer, case.options):
            name = type(transformer.get_submodule(site.block)).__name__
            tried.add(name)
            choices.add((name, site.choice))
    assert tried == set(BLOCKS)
    for case in CASES:
        transformer = case.tiny().transformer
        for name, module in transformer.named_modules():
            known = BLOCKS.get(type(module).__name__)
            for row in known(module) if known else ():
                assert row.choice == "fused" or (type(module).__name__, row.choice) in choices, name
