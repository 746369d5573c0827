"""The moving average: closed form, warm-up, interval, precision, round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.ema import Ema, blend_into


def values(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"a": torch.randn(3, 4, generator=generator).to(dtype), "b": torch.randn(5, generator=generator).to(dtype)}


def run(ema: Ema, steps: range) -> Ema:
    for step in steps:
        ema.update(values(step))
    return ema


@pytest.mark.parametrize(("interval", "warmup"), [(1, False), (1, True), (8, True), (3, False)])
def test_average_after_many_steps_has_its_closed_form(interval: int, warmup: bool) -> None:
    ema = Ema(0.9, interval, warmup)
    ema.start(values(0))
    run(ema, range(1, 41))
    # e_N = prod_i d_i e_0 + sum_i (1 - d_i) prod_{j > i} d_j x_i, over the steps n at which it averages.
    averaged = [n for n in range(1, 41) if n % interval == 0]
    decays = {n: min(0.9, (1 + n) / (10 + n)) if warmup else 0.9 for n in averaged}
    for name in ("a", "b"):
        expected, left = torch.zeros_like(values(0)[name], dtype=torch.float64), 1.0
        for n in reversed(averaged):
            expected += (1 - decays[n]) * left * values(n)[name]
            left *= decays[n]
        expected += left * values(0)[name]
        torch.testing.assert_close(ema.averages[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.num_updates == 40


def test_warm_up_keeps_little_at_first() -> None:
    ema = Ema(0.9)
    assert ema.decay_at(0) == pytest.approx(1 / 10)
    assert ema.decay_at(8) == pytest.approx(9 / 18)
    assert ema.decay_at(79) == pytest.approx(80 / 89)
    assert ema.decay_at(81) == 0.9
    assert Ema(0.9, warmup=False).decay_at(0) == 0.9


def test_only_every_interval_moves_the_average() -> None:
    ema = Ema(0.9, interval=4)
    ema.start(values(0))
    before = ema.state_dict()["averages"]["a"]
    run(ema, range(1, 4))
    assert torch.equal(ema.averages["a"], before)
    run(ema, range(4, 5))
    assert not torch.equal(ema.averages["a"], before)


def test_averages_are_wide_copies() -> None:
    current = values(0, torch.bfloat16) | {"theta": torch.ones(2, dtype=torch.float64)}
    ema = Ema(0.999, interval=1, warmup=False)
    ema.start(current)
    assert [ema.averages[name].dtype for name in ("a", "b", "theta")] == [torch.float32] * 2 + [torch.float64]
    # In bfloat16 a step of 0.001 of the distance would be rounded away for ever.
    for _ in range(100):
        ema.update({name: tensor + 1 for name, tensor in current.items()})
    assert torch.equal(current["a"], values(0, torch.bfloat16)["a"])
    moved = ema.averages["theta"] - 1
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.999**100))
    expected = current["b"].float() + (1 - 0.999**100) * ((current["b"] + 1).float() - current["b"].float())
    torch.testing.assert_close(ema.averages["b"], expected, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = Ema(0.95, interval=3)
    straight.start(values(0))
    run(straight, range(1, 31))
    first = Ema(0.95, interval=3)
    first.start(values(0))
    run(first, range(1, 14))
    state = first.state_dict()
    torch.save(state, tmp_path / "ema.pt")
    run(first, range(14, 20))  # must not reach into the saved state
    for started in (False, True):
        second = Ema(0.95, interval=3)
        if started:
            second.start(values(99))
        for saved in (state, torch.load(tmp_path / "ema.pt", weights_only=True)):
            second.load_state_dict(saved)
            run(second, range(14, 31))
            assert second.num_updates == 30
            assert all(torch.equal(second.averages[name], straight.averages[name]) for name in ("a", "b"))


def test_blending_keeps_the_named_share() -> None:
    old = {"a": torch.tensor([0.0, 4.0])}
    blend_into(old, {"a": torch.tensor([1.0, 2.0], requires_grad=True)}, 0.25)
    assert old["a"].tolist() == [0.75, 2.5]
    blend_into(old, {"a": torch.tensor([0.1, 0.3])}, 0.0)
    assert torch.equal(old["a"], torch.tensor([0.1, 0.3]))  # decay 0 is a copy, to the bit


def test_other_tensors_and_bad_settings_are_refused() -> None:
    ema = Ema(interval=1)
    ema.start(values(0))
    with pytest.raises(ValueError, match="b differ in name or shape"):
        ema.update({"a": values(0)["a"]})
    with pytest.raises(ValueError, match="a differ in name or shape"):
        ema.load_state_dict({"num_updates": 1, "averages": {"a": torch.zeros(1), "b": values(0)["b"]}})
    with pytest.raises(UserError, match=r"decay is 1\.0"):
        Ema(1.0)
    with pytest.raises(UserError, match="interval is 0"):
        Ema(interval=0)
