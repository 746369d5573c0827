"""Tiny untrained transformers, one for each class that has sites, with inputs to run them."""

from __future__ import annotations

from site_models import flux_like, joint, single_stream, table_blocks, video  # noqa: F401 - they fill the list
from site_models.base import CASES, Case, Tiny

__all__ = ["CASES", "Case", "Tiny"]
