"""Step sizes from an ablation: the map, where they act, what a resumed search must find, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_module import FakeModule, N, StopAt, fingerprint, fit
from torch import nn

from calibri_lightning.arrays import Floats
from calibri_lightning.calibration import Layout, build_layout, find_sites
from calibri_lightning.calibration import fingerprint as model_fingerprint
from calibri_lightning.errors import UserError
from calibri_lightning.shapes.pipeline import TINY, build_pipeline
from calibri_lightning.strategies import CMAES
from calibri_lightning.strategies.cma_core import CMACore
from calibri_lightning.strategies.search import SearchSpace
from calibri_lightning.strategies.sensitivity import (
    MOST,
    Sensitivity,
    read_sensitivity,
    step_factors,
    write_sensitivity,
)


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    return build_pipeline(TINY).transformer


def layout_of(transformer: nn.Module) -> Layout:
    return build_layout(find_sites(transformer), "layer", "cfg", 3.0, "guidance")


def module_of(layout: Layout, transformer: nn.Module) -> Any:
    """As much of a module as a search space takes."""
    engine = SimpleNamespace(backbone=SimpleNamespace(transformer=transformer))
    return SimpleNamespace(layout=layout, start_theta=layout.start, engine=engine)


def measured(transformer: nn.Module, layout: Layout, folder: Path) -> Path:
    """A file of sensitivities from 0.05 up, each a fifth above the one before."""
    values = 0.05 * 1.2 ** np.arange(len(layout.scale_names))
    distances = dict(zip(layout.scale_names, values.tolist(), strict=True))
    path = folder / "sensitivity.json"
    write_sensitivity(path, Sensitivity(model_fingerprint(transformer), layout.granularity, 4, 8, distances))
    return path


@pytest.mark.parametrize("distances", [[0.3, 0.3, 0.3], [0.1, 0.2, 0.25], [0.1, 0.1, 0.1, 0.11]])
def test_steps_are_inverse_to_distances_within_the_limits(distances: list[float]) -> None:
    factors = step_factors(np.array(distances))
    # Of a reward that falls with the square of the distance every step then costs the same.
    assert factors * distances == pytest.approx([factors[0] * distances[0]] * len(distances), rel=1e-5)
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-5)


def test_steps_have_limits_and_their_geometric_mean_is_1_for_all_that() -> None:
    for distances in ([0.0, 0.1, 0.1, 5.0], [1e-9, 0.2, 0.3, 0.1, 0.4], [0.0, 0.0, 1.0]):
        factors = step_factors(np.array(distances))
        assert factors.min() >= 1 / MOST - 1e-6
        assert factors.max() <= MOST + 1e-6
        assert np.log(factors).mean() == pytest.approx(0, abs=1e-5)
        assert (np.diff(factors[np.argsort(distances)]) <= 0).all(), "who acts more strongly steps less"


def test_the_first_generation_is_spread_as_measured(transformer: nn.Module, tmp_path: Path) -> None:
    layout = layout_of(transformer)
    path = measured(transformer, layout, tmp_path)
    strategy = CMAES(sigma0=0.02, popsize=4000, bucket_size=1, sigma_from=str(path))
    space = strategy.space(module_of(layout, transformer))
    core = strategy.build_core(space, 0, strategy.resolve(layout.num_parameters, None, {}))
    spread = core.ask(0).std(axis=0, ddof=1)
    distances = np.array(list(read_sensitivity(path).distances.values()))
    expected = 0.02 * np.concatenate([np.tile(step_factors(distances), 2), layout.stds[-2:]])
    # The standard error of a standard deviation is its 1 / sqrt(2 n).
    np.testing.assert_allclose(spread, expected, rtol=5 / np.sqrt(2 * 4000))
    assert expected[0] > 1.5 * expected[len(distances) - 1], "the test tells them apart"


def test_without_a_file_nothing_changes(transformer: nn.Module) -> None:
    layout = layout_of(transformer)
    strategy = CMAES()
    assert strategy.space(module_of(layout, transformer)).stds.tobytes() == layout.stds.tobytes()
    assert "sigma_from" not in strategy.resolve(layout.num_parameters, None, {})


class Measured(FakeModule):
    """The analytic quadratic with a layout that a measurement can be of."""

    def __init__(self, folder: Path, transformer: nn.Module, path: Path) -> None:
        # Without annealing, which would depend on where the first part was meant to end.
        super().__init__(CMAES(popsize=8, bucket_size=8, cmean_final=1.0, sigma_from=str(path)), folder)
        self.engine = SimpleNamespace(backbone=SimpleNamespace(transformer=transformer))
        scales = tuple(f"block.{i}" for i in range(N - 1))
        known = {"granularity": "block", "scale_names": scales, "members": (None,), "num_parameters": N}
        self.layout = SimpleNamespace(**vars(self.layout), **known)


def test_resumed_equals_uninterrupted_and_another_file_is_refused(transformer: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    distances = {f"block.{i}": 0.1 * 1.5**i for i in range(N - 1)}
    found = Sensitivity(model_fingerprint(transformer), "block", 4, 8, distances)
    write_sensitivity(path, found)
    whole = Measured(tmp_path / "whole", transformer, path)
    fit(whole, 4)
    trainer = fit(Measured(tmp_path / "parts", transformer, path), 4, StopAt(2))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    resumed = Measured(tmp_path / "parts", transformer, path)
    fit(resumed, 4, ckpt=tmp_path / "c.ckpt")
    assert fingerprint(resumed) == fingerprint(whole)

    write_sensitivity(path, Sensitivity(found.model, "block", 4, 8, distances | {"block.0": 0.2}))
    with pytest.raises(UserError, match="sigma_from was .* and is "):
        fit(Measured(tmp_path / "parts", transformer, path), 4, ckpt=tmp_path / "c.ckpt")
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        fit(Measured(tmp_path / "parts", transformer, path), 4, ckpt=tmp_path / "c.ckpt")


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return write


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda path: path.write_text(path.read_text()[:-30]), "it is not JSON"),
    "list": (lambda path: path.write_text("[1]"), "which is no calibri_lightning.sensitivity"),
    "calibration": (edited(lambda d: d.update(format="calibri_lightning.calibration")), "which is no"),
    "version": (edited(lambda d: d.update(format_version=2)), "format_version 2"),
    "no distances": (edited(lambda d: d.pop("distances")), "was edited or cut"),
    "nan": (edited(lambda d: d["distances"].update({next(iter(d["distances"])): float("nan")})), "is no number"),
    "word": (edited(lambda d: d["distances"].update({next(iter(d["distances"])): "far"})), "was edited or cut"),
    "all 0": (edited(lambda d: d.update(distances=dict.fromkeys(d["distances"], 0.0))), "no distance above 0"),
    "model": (edited(lambda d: d["model"].update(sites_hash="0")), "another architecture or size"),
    "granularity": (edited(lambda d: d.update(granularity="gate")), "Run ablate with --by layer"),
    "sites": (edited(lambda d: d["distances"].update({"block.99": 0.1})), "other sites.*block.99"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused(name: str, transformer: nn.Module, tmp_path: Path) -> None:
    spoil, message = BAD[name]
    layout = layout_of(transformer)
    path = measured(transformer, layout, tmp_path)
    spoil(path)
    with pytest.raises(UserError, match=message):
        CMAES(sigma_from=str(path)).space(module_of(layout, transformer))


def loss_after(stds: Floats, curvature: Floats, generations: int) -> float:
    """How far a search stays below the top of a quadratic whose optimum every coordinate misses by as much."""
    n = len(stds)
    core = CMACore(SearchSpace(np.zeros(n), np.full(n, -9.0), np.full(n, 9.0), stds), 0, 0.2, 16, (1,))
    for generation in range(generations):
        core.tell(-(curvature * (core.ask(generation) - 0.5 / np.sqrt(curvature)) ** 2).sum(axis=1)[:, None])
    return float((curvature * (core.mean - 0.5 / np.sqrt(curvature)) ** 2).sum())


def test_on_a_quadratic_the_map_helps() -> None:
    curvature = np.logspace(0, 1.5, 30)
    seeded = loss_after(step_factors(np.sqrt(curvature)), curvature, 15)
    assert seeded < 0.7 * loss_after(np.ones(30), curvature, 15)
