"""`summary.json`: a summary as strict JSON, with every single reward so that anyone can compute it again.

NaN has no place in JSON: a reward that failed and an interval that does not exist are written as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibri_lightning.atomic import replacing
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.diversity import Diversity
from calibri_lightning.evaluation.summary import (
    Budget,
    Comparison,
    Condition,
    DiversityIntervals,
    Summary,
    summarise,
)
from calibri_lightning.evaluation.text import verdict

FORMAT_VERSION = 1


def to_json(summary: Summary) -> str:
    """Write a summary as strict JSON.

    Args:
        summary: What a run found.

    Returns:
        Indented JSON text, ending in a newline. `from_json` gives the summary back.
    """
    conditions = [
        {
            "name": c.name,
            "role": c.role,
            "num_steps": c.num_steps,
            "num_forwards_per_image": c.num_forwards_per_image,
            "means": {name: _interval(mean) for name, mean in means.items()},
            "rewards": {name: [_number(r) for r in rewards] for name, rewards in c.rewards.items()},
            "diversity": None if c.diversity is None else _diversity(c.diversity),
        }
        for c, means in zip(summary.conditions, summary.means, strict=True)
    ]
    document = {
        "format_version": FORMAT_VERSION,
        "verdict": verdict(summary),
        "reward": summary.reward,
        "watched": list(summary.watched),
        "level": summary.level,
        "calibration": summary.calibration,
        "calibration_sha256": summary.calibration_sha256,
        "budget": {
            "images": summary.budget.images,
            "forwards": summary.budget.forwards,
            "device_seconds": summary.budget.device_seconds,
        },
        "comparisons": [_comparison(c) for c in summary.comparisons],
        "diversity": {
            "means": {c.name: _intervals(d) for c, d in zip(summary.conditions, summary.diversity, strict=False)},
            "comparisons": [
                {"calibrated": c.calibrated, "base": c.base, "against": c.against, **_intervals(c.differences)}
                for c in summary.diversity_comparisons
            ],
        },
        "conditions": conditions,
        "clusters": None if summary.clusters is None else list(summary.clusters),
    }
    # The readable part first and indented; the long lists of rewards on one line each.
    return _indent_but_lists(document) + "\n"


def from_json(text: str) -> Summary:
    """Read a summary back; its intervals are computed again from the rewards it holds.

    Args:
        text: What `to_json` wrote.

    Returns:
        The summary.

    Raises:
        UserError: If the text is no summary of this version.
    """
    try:
        document = json.loads(text)
        version = document["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"summary has format_version {version!r}; the rule is {FORMAT_VERSION}; run `test` again")
        conditions = [
            Condition(
                c["name"],
                c["role"],
                c["num_steps"],
                c["num_forwards_per_image"],
                {
                    name: np.array([math.nan if r is None else r for r in rewards])
                    for name, rewards in c["rewards"].items()
                },
                _read_diversity(c.get("diversity")),  # absent from the files of older versions
            )
            for c in document["conditions"]
        ]
        budget, clusters, level = Budget(**document["budget"]), document["clusters"], document["level"]
        # Absent from the files of older versions.
        watched, sha256 = document.get("watched", ()), document.get("calibration_sha256", "")
        where = document["calibration"]
        return summarise(conditions, document["reward"], budget, where, clusters, level, watched, sha256)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not a summary.json ({error!r}); give the file that `fit` or `test` wrote") from error


def write_summary(path: str | Path, summary: Summary) -> None:
    """Write `summary.json` whole or not at all.

    Args:
        path: The file; its folder exists. An older file is replaced.
        summary: What a run found.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_text(to_json(summary), encoding="utf-8")


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval(interval: Interval) -> Mapping[str, float | int | None]:
    return {
        "mean": _number(interval.mean),
        "low": _number(interval.low),
        "high": _number(interval.high),
        "count": interval.count,
        "dropped": interval.dropped,
    }


def _diversity(diversity: Diversity) -> Mapping[str, object]:
    return {
        "samples": diversity.samples,
        "features": diversity.features,
        "vendi": [_number(value) for value in diversity.vendi],
        "pixel_distance": [_number(value) for value in diversity.pixel_distance],
    }


def _intervals(diversity: DiversityIntervals) -> Mapping[str, object]:
    return {"vendi": _interval(diversity.vendi), "pixel_distance": _interval(diversity.pixel_distance)}


def _read_diversity(document: Mapping[str, Any] | None) -> Diversity | None:
    if document is None:
        return None
    vendi, distance = (
        tuple(math.nan if value is None else float(value) for value in document[name])
        for name in ("vendi", "pixel_distance")
    )
    return Diversity(vendi, distance, document["samples"], document["features"])


def _comparison(c: Comparison) -> Mapping[str, object]:
    return {
        "calibrated": c.calibrated,
        "base": c.base,
        "against": c.against,
        "reward": c.reward,
        "difference": _interval(c.difference),
        "excludes_zero": c.difference.excludes(0.0),
        "win_rate": _number(c.wins.rate),
        "wins": c.wins.wins,
        "ties": c.wins.ties,
        "losses": c.wins.losses,
    }


def _indent_but_lists(value: object, indent: str = "") -> str:
    """Strict JSON with objects indented and each list of numbers on one line."""
    inner = indent + "  "
    if isinstance(value, Mapping) and value:
        items = [f"{inner}{json.dumps(key)}: {_indent_but_lists(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
        items = [inner + _indent_but_lists(item, inner) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
