"""What a run is refused for before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from calibri_lightning.calibration.scales import Member
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Settings of trainer.precision that leave parameters as they are."""

CUTTING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
"""Strategies of Lightning for models that do not fit one GPU."""


def check_precision(precision: str) -> None:
    """Refuses a precision that would cast theta.

    Args:
        precision: The trainer's.

    Raises:
        UserError: If it casts parameters.
    """
    if precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision is {precision}, which casts every parameter, theta included; half precision "
            f"resolves scales near 1 no finer than 0.008. Use one of {', '.join(PRECISIONS)}, and set the "
            "backbone's dtype to bfloat16 to halve its memory."
        )


def check_strategy(strategy: object) -> None:
    """Refuses strategies of the trainer that would cut theta and a LoRA up together with the model, or not sum them.

    Args:
        strategy: The trainer's.

    Raises:
        UserError: If it is one of those, and not ours.
    """
    lines = [kind.__name__ for kind in type(strategy).__mro__]
    cutting = next((name for name in lines if name in CUTTING_STRATEGIES), None)
    if cutting is not None and not hasattr(type(strategy), "shard_mesh"):
        raise UserError(
            f"trainer.strategy is {lines[0]}, which cuts every parameter up among ranks, or leaves that to a module "
            f"that is written for it. For a model that does not fit one GPU use --trainer.strategy=sharded "
            "(calibri_lightning.Sharded); where it fits, --trainer.strategy=ddp."
        )


def check_negatives(members: Sequence[Member], where: str, prompts: Sequence[Prompt]) -> None:
    """Refuses negative prompts that no member would see.

    Args:
        members: Say what they see.
        where: Where the prompts come from, as the user calls it, such as data.val.
        prompts: The prompts.

    Raises:
        UserError: If a prompt has a negative prompt and every member sees the prompt alone.
    """
    written = [prompt for prompt in prompts if prompt.negative]
    if written and all(member.prompt == "prompt" for member in members):
        raise UserError(
            f"{where} has {len(written)} negative prompts, the first of them {written[0].negative!r} (for "
            f"{written[0].text!r}), but no member sees a negative prompt. Use calibration.members: cfg, which "
            "guidance-distilled models such as FLUX.2-dev do not offer, or remove the negative prompts from the data."
        )
