"""DiffusionNFT in a fit: gradients against a loop by hand, who makes the pictures, costs, resume, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from run_files import checkpoint
from tiny_policies import REDNESS, CountedRows, killed_and_resumed, perturbed, policy_module, same, state_of, train
from tiny_runs import TRAIN, Capture, TinyRuns, refused
from torch import Tensor

from calibri_lightning import CalibriModule, DiffusionNFT
from calibri_lightning.adapters.swap import overwrite
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.sampling.noise import forward_noise_seed, levels_seed
from calibri_lightning.strategies.diffusion_nft import OLD
from calibri_lightning.strategies.gradient_step import AdamWOptions
from calibri_lightning.strategies.groups import Slots
from calibri_lightning.strategies.nft_loss import NFTOptions, OldPolicyDecay
from calibri_lightning.strategies.policy_strategy import UnitWork
from calibri_lightning.strategies.selection import START
from calibri_lightning.strategies.step_record import StepRecord

pytestmark = pytest.mark.usefixtures("no_plots")

BATCH = PromptBatch(4, (Prompt("a red circle", 0), Prompt("a blue square", 3)))
SLOTS = Slots.of(BATCH, 3, 0)
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 7.0, -0.3, 0.9])
MASK = torch.tensor([True, True, False, True, True, True])


def nft(**options: Any) -> DiffusionNFT:
    return DiffusionNFT(**({"num_groups": 2, "group_size": 3, "pictures_per_unit": 3} | options))


def moved(module: CalibriModule) -> CalibriModule:
    """With a start, an old and a live policy that all differ."""
    for name, seed in ((START, 1), (OLD, 2)):
        module.policy.keep(name, dict(perturbed(module.policy.parameters(), 0.1, seed)))
    overwrite({n: p.detach() for n, p in module.policy.parameters().items()}, module.policy.tensors(OLD))
    overwrite(
        {n: p.detach() for n, p in module.policy.parameters().items()},
        dict(perturbed(module.policy.parameters(), 0.05, 3)),
    )
    return module


def gradients(module: CalibriModule, unit_size: int) -> dict[str, Tensor]:
    """What `draw` and `backward` leave, over all units of the slots."""
    strategy = module.strategy
    assert isinstance(strategy, DiffusionNFT)
    record = StepRecord(strategy.stats)
    for unit in SLOTS.units(unit_size):
        here = slice(unit.start, unit.stop)
        with torch.no_grad():
            kept = strategy.draw(module, SLOTS, unit).kept
        strategy.backward(module, UnitWork(SLOTS, unit, kept, ADVANTAGES[here], MASK[here], 6, True), record)
    found = {name: p.grad.clone() for name, p in module.policy.parameters().items() if p.grad is not None}
    for parameter in module.policy.parameters().values():
        parameter.grad = None
    return found


class ByHand:
    """The same policy without any of the machinery under test: one picture and one member at a time."""

    def __init__(self, module: CalibriModule) -> None:
        self.module, self.backbone = module, module.engine.backbone
        self.parameters = module.policy.parameters()

    def velocity(self, x: Tensor, t: Tensor, slot: int, theta: Tensor | None = None) -> Tensor:
        rows = self.module.layout.rows((self.module.theta if theta is None else theta)[None])
        total = torch.zeros_like(x)
        for place, member in enumerate(self.module.layout.members):
            seen = SLOTS.prompts[slot].text if member.prompt == "prompt" else ""
            conditioning = self.backbone.encode([seen], negative=member.prompt == "negative")
            with self.module.engine.attachment.rows(rows.scales[:, place].float()):
                total = total + rows.weights[0, place] * self.backbone.velocity(x, t[None], conditioning)
        return total

    def frozen(self, tensors: dict[str, Tensor], x: Tensor, t: Tensor, slot: int) -> Tensor:
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data.copy_(tensors[name])
        theta = tensors.get("theta", self.module.theta.detach())
        with torch.no_grad():
            velocity = self.velocity(x, t, slot, theta)
        for name, p in self.parameters.items():
            p.data.copy_(live[name])
        return velocity

    def base(self) -> dict[str, Tensor]:
        """No scales, and a LoRA whose second factor is 0."""
        tensors = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        if "theta" in tensors:
            tensors["theta"] = torch.from_numpy(self.module.layout.start.copy())
        return tensors

    def loss(
        self, slot: int, num_timesteps: int, beta: float, kl_weight: float, reference: dict[str, Tensor]
    ) -> Tensor:
        seed, sigmas = SLOTS.seeds[slot], self.backbone.schedule(self.module.num_steps)
        old = dict(self.module.policy.tensors(OLD))
        x0 = self.backbone.noise([seed])
        for one, other in zip(sigmas, sigmas[1:], strict=False):
            x0 = x0 + (other - one) * self.frozen(old, x0, one, slot)
        order = torch.randperm(len(sigmas) - 1, generator=torch.Generator().manual_seed(levels_seed(seed)))
        w = float((ADVANTAGES[slot] / 5).clamp(-1, 1)) / 2 + 0.5
        total = torch.zeros(())
        for number in range(num_timesteps):
            t = sigmas[order[number]]
            x_t = (1 - t) * x0 + t * self.backbone.noise([forward_noise_seed(seed, number)])
            v, v_old, v_ref = (
                self.velocity(x_t, t, slot),
                self.frozen(old, x_t, t, slot),
                self.frozen(reference, x_t, t, slot),
            )
            errors = []
            for implicit in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
                error = x_t - t * implicit - x0
                errors.append((error**2).mean() / error.detach().abs().mean())
            total = total + 5 * (w * errors[0] + (1 - w) * errors[1]) / beta + kl_weight * ((v - v_ref) ** 2).mean()
        return total


@pytest.mark.parametrize(
    ("trains", "members", "reference"),
    [("scales", "cfg", "start"), ("lora", "single", "base"), ("both", "cfg", "base")],
)
def test_gradient_is_that_of_a_loop_over_pictures_levels_and_members(
    tiny_folder: Path, trains: str, members: str, reference: str
) -> None:
    strategy = nft(train=trains, num_timesteps=2, loss=NFTOptions(0.4, 5.0, 0.3), reference=reference)
    module = moved(policy_module(tiny_folder, strategy, members, num_steps=3))
    hand = ByHand(module)
    target = hand.base() if reference == "base" else dict(module.policy.tensors(START))
    for slot in (slot for slot in range(6) if MASK[slot]):
        (hand.loss(slot, 2, 0.4, 0.3, target) / (6 * 2)).backward()
    expected = {name: p.grad.clone() for name, p in hand.parameters.items() if p.grad is not None}
    for p in hand.parameters.values():
        p.grad = None

    found = gradients(module, 6)

    assert found.keys() == expected.keys()
    assert any(gradient.any() for gradient in found.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max() + 1e-3)), name


@pytest.mark.usefixtures("untouched_rng")
def test_units_of_any_size_leave_the_same_gradient(tiny_folder: Path) -> None:
    """Levels and noise belong to a picture; so ranks, which share the units, add up to the same."""
    module = moved(policy_module(tiny_folder, nft(train="both")))
    whole = gradients(module, 6)
    for size in (2, 4):
        for name, gradient in gradients(module, size).items():
            assert torch.allclose(gradient, whole[name], rtol=1e-3, atol=1e-6), name


def test_offloaded_pictures_leave_the_same_gradient(tiny_folder: Path) -> None:
    kept, offloaded = (moved(policy_module(tiny_folder, nft(train="scales", offload=off))) for off in (False, True))
    assert same(gradients(kept, 3), gradients(offloaded, 3))


@pytest.mark.parametrize("trains", ["scales", "both"])
def test_the_old_policy_makes_the_pictures(tiny_folder: Path, trains: str) -> None:
    strategy = nft(train=trains)
    module = moved(policy_module(tiny_folder, strategy, "cfg"))

    def pictures() -> Tensor:
        with torch.no_grad():
            return strategy.draw(module, SLOTS, range(3)).latents

    before = pictures()
    live = {name: p.detach() for name, p in module.policy.parameters().items()}
    overwrite(live, dict(perturbed(live, 0.3, 9)))
    changed = {name: tensor.clone() for name, tensor in live.items()}
    assert torch.equal(pictures(), before), "whatever the live policy is"
    assert same(live, changed), "and the live policy is what it was"
    module.policy.keep(OLD, changed)
    assert not torch.equal(pictures(), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_picture_that_went_wrong_leaves_no_trace_in_the_gradient(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    strategy = nft(train="both")
    module = moved(policy_module(tiny_folder, strategy))
    expected = gradients(module, 3)
    noise = module.engine.backbone.noise

    def broken(seeds: Sequence[int]) -> Tensor:
        rows = noise(seeds)
        rows[[seed == SLOTS.seeds[2] for seed in seeds]] = bad
        return rows

    monkeypatch.setattr(module.engine.backbone, "noise", broken)
    assert not MASK[2], "its reward is not finite either"
    for name, gradient in gradients(module, 3).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-6), name


class Watch(Callback):
    """Keeps the live and the old policy after each step."""

    def __init__(self) -> None:
        self.old: list[dict[str, Tensor]] = []
        self.live: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        for name, kept in ((OLD, self.old), ("live", self.live)):
            kept.append({key: tensor.clone() for key, tensor in module.policy.tensors(name).items()})


@pytest.mark.parametrize("trains", ["scales", "both"])
def test_the_old_policy_follows_as_its_schedule_says(tiny_folder: Path, tmp_path: Path, trains: str) -> None:
    decay = OldPolicyDecay(start=0.25, slope=0.25, maximum=0.6)
    module = policy_module(tiny_folder, nft(train=trains, old_decay=decay))
    expected = {name: p.detach().clone() for name, p in module.policy.parameters().items()}
    watch = Watch()
    train(module, tiny_folder, tmp_path, 3, watch)
    for eta, old, live in zip((0.5, 0.6, 0.6), watch.old, watch.live, strict=True):
        expected = {name: eta * tensor + (1 - eta) * live[name] for name, tensor in expected.items()}
        for name, tensor in expected.items():
            assert torch.allclose(old[name], tensor, rtol=1e-6, atol=1e-9), name
        assert not same(old, live)


@pytest.mark.parametrize("members", ["single", "cfg"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_costs_are_those_on_paper_and_those_of_the_network(
    tiny_folder: Path, tmp_path: Path, members: str, kl_weight: float
) -> None:
    options = {"num_steps": 4, "num_timesteps": 3, "loss": NFTOptions(kl_weight=kl_weight)}
    module = policy_module(tiny_folder, nft(train="scales", **options), members, num_steps=2)
    counted = CountedRows(module.engine.backbone.transformer)
    train(module, tiny_folder, tmp_path, 1)
    rows = 1 if members == "single" else 2
    # 4 sampling steps; for each of 3 levels the old policy 1, the policy and its backward 2, the reference 1.
    assert module.budget.forwards == 6 * rows * (4 + 3 * (4 if kl_weight else 3)) == counted.count
    assert module.budget.images == 6


FIT = (
    "--model.strategy=DiffusionNFT",
    "--model.strategy.num_groups=2",
    "--model.strategy.group_size=3",
    "--model.strategy.pictures_per_unit=3",
    "--model.strategy.num_timesteps=2",
    "--model.strategy.old_decay.start=0.5",
    "--model.strategy.old_decay.maximum=0.5",
    "--model.strategy.ema.interval=1",
    "--model.calibration.members=single",
    "--model.calibration.weight_mode=fixed",
)


@pytest.mark.parametrize("trains", ["scales", "lora"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trains: str
) -> None:
    """Weights, optimiser, average, old policy and best copy, bit for bit."""
    lora = ("--model.lora.rank=2",) if trains == "lora" else ()
    flags = (*FIT, f"--model.strategy.train={trains}", *lora)
    resumed, whole = killed_and_resumed(runs, tmp_path, monkeypatch, *flags)
    found, expected = (state_of(checkpoint(path), "DiffusionNFT") for path in (resumed, whole))
    assert set(expected["policy"]["copies"]) >= {OLD, START}
    assert not same(expected["policy"]["copies"][OLD], expected["policy"]["copies"][START])
    for name, value in expected.items():
        assert same(found[name], value), name
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()


def test_a_second_fit_of_one_module_starts_with_a_new_old_policy(tiny_folder: Path, tmp_path: Path) -> None:
    module = policy_module(tiny_folder, nft(train="scales", old_decay=OldPolicyDecay(start=1.0, maximum=1.0)))
    train(module, tiny_folder, tmp_path, 1)
    assert torch.equal(module.policy.tensors(OLD)["theta"], torch.from_numpy(module.layout.start.copy()))
    trained = module.theta.detach().clone()
    assert not torch.equal(trained, torch.from_numpy(module.layout.start.copy()))
    train(module, tiny_folder, tmp_path, 1)
    assert torch.equal(module.policy.tensors(OLD)["theta"], trained)


class Judge(Callback):
    """Scores the same pictures before and after."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.before = self.score(module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.after = self.score(module)

    @staticmethod
    def score(module: CalibriModule) -> Any:
        prompts = [Prompt(text, index) for index, text in enumerate(TRAIN)]
        return module.evaluate(module.start_theta[None], prompts, range(100, 100 + len(prompts))).rewards[0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_trivial_reward_rises_whichever_way_it_points(tiny_folder: Path, tmp_path: Path, sign: float) -> None:
    strategy = nft(
        train="full",
        group_size=24,
        pictures_per_unit=48,
        optimizer=AdamWOptions(lr=0.02),
        loss=NFTOptions(kl_weight=0.0),
        ema=None,
    )
    module = policy_module(tiny_folder, strategy, rows_per_forward=48, rewards={REDNESS: sign})
    judge = Judge()
    train(module, tiny_folder, tmp_path, 5, judge)
    gain = judge.after - judge.before
    assert gain.mean() > judge.before.std(), "more than pictures differ"
    assert gain.min() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 1}, ["group_size is 1", "compare the pictures"]),
        ({"num_steps": 0}, ["num_steps is 0", "at least 1"]),
        ({"num_timesteps": 0}, ["num_timesteps is 0", "at least 1"]),
        ({"noisiest": 0.0}, ["noisiest is 0.0", "above 0"]),
        ({"noisiest": 1.5}, ["noisiest is 1.5", "at most at 1"]),
        ({"timesteps": "all"}, ["timesteps is 'all'", "schedule, uniform"]),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        nft(**options)
    for word in words:
        assert word in str(caught.value)


def test_more_levels_than_the_schedule_has_are_refused_before_the_first_picture(
    runs: TinyRuns, capsys: Capture
) -> None:
    flags = (*FIT, "--model.strategy.train=scales", "--model.strategy.num_timesteps=3", "--data.val=null")
    message = refused(runs, capsys, *flags, worked=True)
    for word in ("num_timesteps is 3", "schedule of 2 steps has 2 noise levels", "timesteps: uniform"):
        assert word in message
    assert runs("fit", "good", *flags, "--model.strategy.timesteps=uniform", "--trainer.max_steps=1") == 0


@pytest.mark.parametrize("changed", [{"num_timesteps": 1}, {"old_decay": OldPolicyDecay(start=0.1)}])
def test_other_settings_do_not_go_on_from_a_checkpoint(
    tiny_folder: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    module = policy_module(tiny_folder, nft(train="scales"))
    train(module, tiny_folder, tmp_path, 1).save_checkpoint(tmp_path / "a.ckpt")
    other = policy_module(tiny_folder, nft(train="scales", **changed))
    with pytest.raises(UserError, match="noise levels" if "num_timesteps" in changed else "old policy"):
        train(other, tiny_folder, tmp_path, 2, ckpt=tmp_path / "a.ckpt")
