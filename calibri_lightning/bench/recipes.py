"""The published recipes whose training steps are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from calibri_lightning.sampling.windows import AllSteps, RandomWindow, Window
from calibri_lightning.strategies.flow_grpo import FlowGRPO
from calibri_lightning.strategies.grpo_loss import GRPOOptions

Trained = Literal["lora", "scales"]
"""What a measured step trains."""
WINDOW = 3
"""Steps in the window of the fast recipe."""
KL_WEIGHT = 0.04
"""Weight of the KL term; it plays no part in what a step costs."""


@dataclass(frozen=True)
class Variant:
    """What is trained, and how gradients are taken."""

    trained: Trained
    checkpointing: bool
    """Whether activations are computed again in the backward."""

    @property
    def name(self) -> str:
        """How the report calls it."""
        return f"{self.trained}, checkpointing" if self.checkpointing else self.trained


VARIANTS = tuple(Variant(trained, checkpointing) for trained in get_args(Trained) for checkpointing in (False, True))
"""Everything that each recipe is measured with."""


@dataclass(frozen=True)
class Recipe:
    """A way to train with Flow-GRPO."""

    name: str
    """How the report calls it."""
    guided: bool
    """Whether pictures are made and trained on with a negative prompt, which doubles every forward."""
    window: Window
    """Which steps are replayed with gradients."""
    has_reference: bool
    """Whether a reference runs in these steps, for the KL term."""

    def strategy(self, variant: Variant, num_steps: int, num_groups: int, group_size: int) -> FlowGRPO:
        """Makes the strategy.

        Args:
            variant: What is trained, and how.
            num_steps: Sampling steps.
            num_groups: Prompts of a training step.
            group_size: Pictures of a prompt.

        Returns:
            A strategy of its own.
        """
        return FlowGRPO(
            train=variant.trained,
            num_groups=num_groups,
            group_size=group_size,
            window=self.window,
            num_steps=num_steps,
            loss=GRPOOptions(kl="mean", kl_weight=KL_WEIGHT) if self.has_reference else GRPOOptions(),
            gradient_checkpointing=variant.checkpointing,
            # How far ratios are from 1 is reported; here nothing is learnt that this could spoil.
            ratio_tolerance=float("inf"),
            # A step that teaches nothing runs no backward: its time would mean nothing.
            max_wasted=1,
        )


def recipes(guided: bool) -> tuple[Recipe, ...]:
    """The recipes of Flow-GRPO-Fast without guidance and of Flow-GRPO (arXiv 2505.05470) with all that it had.

    Args:
        guided: Whether the model is guided by a negative prompt; a guidance-distilled one has none.

    Returns:
        Fast: a window of three steps, no guidance, no KL. Classic: all steps but the last, guidance, KL.
    """
    return (
        Recipe("fast", False, RandomWindow(WINDOW), False),
        Recipe("classic", guided, AllSteps(), True),
    )
