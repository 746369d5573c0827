"""A model that a strategy trains without a trainer, and the count of what passes its transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from calibri_lightning.adapters.lora import LoraOptions, add_lora
from calibri_lightning.adapters.policy import Policy
from calibri_lightning.arrays import Floats
from calibri_lightning.backbones.native import Native
from calibri_lightning.bench.models import twin
from calibri_lightning.calibration import attach, build_layout, find_sites
from calibri_lightning.engine import Engine
from calibri_lightning.launch.pulse import Pulse
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.rewards.blend import Blend
from calibri_lightning.rewards.watch import Watch
from calibri_lightning.strategies.groups import Slots
from calibri_lightning.strategies.unit_denoiser import live_rows, unit_denoiser

if TYPE_CHECKING:
    from calibri_lightning.rewards import RewardSet
    from calibri_lightning.strategies.base import CalibratedModule
    from calibri_lightning.strategies.flow_grpo import FlowGRPO

GUIDANCE = 4.5
"""Guidance scale, where there is a negative prompt: that of Flow-GRPO on SD3.5-M."""
_ENDLESS = 10**9
"""Training steps of a run that others end."""


class PassCounter:
    """Counts the rows that pass a transformer, whatever anybody says that they are.

    Blocks that run again in a backward, for their activations were not kept, are no forward of the transformer.

    Args:
        transformer: The transformer; it gets a hook.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.forwards = 0
        """Rows of forwards."""
        self.backwards = 0
        """Rows of backwards."""
        transformer.register_forward_hook(self._count, with_kwargs=True)

    @property
    def total(self) -> int:
        """Rows of both."""
        return self.forwards + self.backwards

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        # A tensor [B, ...], or a list of B tensors (Z-Image).
        rows = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        self.forwards += rows
        made = output[0]
        parts: list[Tensor] = [made] if isinstance(made, Tensor) else list(made)
        for part in parts:
            if part.requires_grad:
                part.register_hook(self._backward(rows // len(parts)))

    def _backward(self, rows: int) -> Callable[[Tensor], None]:
        def passed(gradient: Tensor) -> None:
            self.backwards += rows

        return passed


class Trainee:
    """What a gradient strategy asks of its module, on modules of its own that share a model's weights.

    Args:
        plain: The model, without hooks and LoRA; it stays as it is.
        guided: Whether a negative prompt guides it.
        strategy: What trains it.
        rewards: What scores the pictures.
        rows: Most rows of a forward.
        prompts: Prompts of every step.
    """

    def __init__(
        self,
        plain: Native,
        guided: bool,
        strategy: FlowGRPO,
        rewards: RewardSet,
        rows: int,
        prompts: Sequence[Prompt],
    ) -> None:
        self.strategy, self.rewards, self.prompts = strategy, rewards, tuple(prompts)
        self.blend, self.watch = Blend(rewards.optimised), Watch()
        backbone = twin(plain)
        if strategy.trains == "lora":
            add_lora(backbone.transformer, LoraOptions(), 0)
        sites = find_sites(backbone.transformer)
        self.layout = build_layout(sites, "gate", "cfg" if guided else "single", GUIDANCE, "fixed")
        self.engine = Engine(backbone, attach(backbone.transformer, sites), self.layout, rewards, rows)
        self.counter = PassCounter(backbone.transformer)
        self.theta = nn.Parameter(torch.from_numpy(self.layout.start.copy()))
        start = torch.from_numpy(self.layout.start.copy())
        self.policy = Policy(self.theta, backbone.transformer, strategy.trains, start)
        self.seed, self.num_steps, self.run_dir = 0, strategy.settings.num_steps or 1, Path()
        self.judged_by: Mapping[str, str | int] = {}
        self.validates = False
        self.pulse = Pulse()
        # One process, which no stop rule of a trainer ends.
        self.trainer = SimpleNamespace(
            global_rank=0,
            world_size=1,
            max_steps=_ENDLESS,
            lightning_module=self,
            should_stop=False,
            strategy=SimpleNamespace(broadcast=lambda value, src=0: value),
        )
        self.num_steps_taken = 0
        self.passed_rows = 0
        """Rows that passed the transformer in training steps, forwards and backwards."""
        self.spent_forwards = 0
        """Forwards that the strategy says it took."""
        self.logged: dict[str, list[float]] = {}
        strategy.on_train_start(cast("Any", self.trainer), cast("Any", self))

    @property
    def module(self) -> CalibratedModule:
        """This object as strategies see it."""
        return cast("CalibratedModule", self)

    def train(self) -> None:
        """Takes one training step on the next pictures."""
        before = self.counter.total
        self.strategy.training_step(self.module, PromptBatch(self.num_steps_taken, self.prompts))
        self.passed_rows += self.counter.total - before
        self.num_steps_taken += 1

    def passes(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """Single forwards of the pictures of a unit, in the middle of the way.

        Returns:
            A forward without gradients, and one with its backward.
        """
        slots = Slots.of(PromptBatch(0, self.prompts), self.strategy.settings.group_size, self.seed)
        unit = slots.units(min(self.engine.evaluator.cells_per_unit, slots.group_size))[0]
        denoiser = unit_denoiser(self.module, slots, unit, self.num_steps)
        x, step = self.engine.backbone.noise([slots.seeds[slot] for slot in unit]), self.num_steps // 2

        def forward() -> None:
            with torch.no_grad(), denoiser.attached():
                denoiser.velocity(x, step)

        def with_backward() -> None:
            policy = denoiser.with_rows(live_rows(self.module, len(denoiser)))
            with policy.attached():
                policy.velocity(x, step).square().mean().backward()
            for parameter in self.policy.parameters().values():
                parameter.grad = None

        return forward, with_backward

    def gather(self, values: Floats) -> Sequence[Floats]:
        """Gives this process' vector to itself.

        Args:
            values: The vector.

        Returns:
            It alone.
        """
        return [values]

    def spend(self, images: int, forwards: int, seconds: float) -> None:
        """Notes what the strategy says it took.

        Args:
            images: Pictures.
            forwards: Forwards of one row, backwards counted once more.
            seconds: Their time.
        """
        self.spent_forwards += forwards

    def optimizers(self) -> Any:
        """Gives an optimiser that does nothing, in the place of the trainer's."""
        return SimpleNamespace(step=lambda: None)

    def log(self, name: str, value: Any) -> None:
        """Keeps a number.

        Args:
            name: Its name.
            value: Its value.
        """
        self.logged.setdefault(name, []).append(float(value))
