"""The examples of the page about metrics run, in their order."""

from __future__ import annotations

import re
from typing import Any

from config_files import ROOT


def test_its_examples_run() -> None:
    page = ROOT / "docs" / "metrics.md"
    text = page.read_text().partition("# Metrics for other loops")[2]
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert names["metric"] is names["kid"]
    assert names["fid"].compute() >= 0
    assert 0 < names["change"].compute() < 1
    assert names["Model"]().reward.compute().isnan()
