"""How many scales the full-size models have, and that docs/models.md says so."""

from __future__ import annotations

from functools import cache

import pytest
from site_models import CASES
from site_models.page import PAGE, render
from site_models.released import FULL_SIZES, FullSize, count

from calibri_lightning.calibration import SiteOptions
from calibri_lightning.calibration.sites import BLOCKS, DEFAULT_OPTIONS


@cache
def options_by_class() -> dict[str, SiteOptions]:
    return {type(case.tiny().transformer).__name__: case.options for case in CASES}


@pytest.mark.parametrize("size", FULL_SIZES, ids=[size.name for size in FULL_SIZES])
def test_counts_of_full_size_models(size: FullSize) -> None:
    transformer = size.build()
    if size.billions is not None:
        assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(size.billions, rel=0.03)
    assert count(transformer, SiteOptions()) == size.counts
    options = options_by_class()[size.model]
    found = count(transformer, options) if options != DEFAULT_OPTIONS else None
    assert found == size.optional


def test_there_is_a_full_size_model_of_every_class() -> None:
    assert {size.model for size in FULL_SIZES} == set(options_by_class())


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run PYTHONPATH=tests python -m site_models.page"


def test_every_class_of_the_table_stands_in_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in (*BLOCKS, *options_by_class()) if f"`{name}`" not in page] == []
