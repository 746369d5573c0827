"""The model with its scales and rewards, and what it can settle only on the device where it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch

from calibri_lightning.backbones import Backbone
from calibri_lightning.backbones.compiling import check_compiler, compile_blocks
from calibri_lightning.calibration import Attachment, Layout
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.lockstep import Lockstep
from calibri_lightning.sampling.rows import automatic_rows


class Engine:
    """Draws and scores pictures, once `start` has settled what depends on the device.

    Args:
        backbone: The model.
        attachment: Hooks on exactly the layout's sites.
        layout: The meaning of theta.
        rewards: What scores the pictures.
        rows_per_forward: Most rows of one forward; auto finds them when the first stage starts.
        compile: Whether the transformer's blocks are compiled.
        overlap_scoring: Whether pictures are scored while the next ones are sampled.
        balance_over: Number of ranks among which every request is shared evenly.

    Raises:
        UserError: If rows_per_forward is below the number of members, or compiling lacks a compiler.
    """

    def __init__(
        self,
        backbone: Backbone,
        attachment: Attachment,
        layout: Layout,
        rewards: RewardSet,
        rows_per_forward: int | Literal["auto"] = "auto",
        compile: bool = False,
        overlap_scoring: bool = True,
        balance_over: int = 1,
    ) -> None:
        self.backbone, self.layout, self.compiles = backbone, layout, compile
        self.attachment, self._rewards, self._overlap = attachment, rewards, overlap_scoring
        self.balance_over = balance_over
        self.rows_are_automatic = rows_per_forward == "auto"
        self.rows_per_forward: int | None = None
        self.lockstep = Lockstep()
        """Which ranks hold the model together."""
        self._evaluator: Evaluator | None = None
        self._is_compiled = False
        if compile:
            check_compiler()
        if isinstance(rows_per_forward, int):
            self.use_rows(rows_per_forward)

    @property
    def evaluator(self) -> Evaluator:
        """Draws and scores; there is none before the rows of a forward are known."""
        assert self._evaluator is not None, "rows_per_forward is settled when a stage starts"
        return self._evaluator

    @property
    def at_once(self) -> int | None:
        """Pictures that are sampled at once, fewer than a unit has where memory ran out; None before rows are known."""
        return None if self._evaluator is None else self._evaluator.at_once

    @property
    def guided(self) -> bool:
        """Whether a member sees the negative prompt."""
        return any(member.prompt == "negative" for member in self.layout.members)

    def use_rows(self, rows: int) -> None:
        """Fixes the rows of a forward: those of the configuration, of a checkpoint, or found by measuring.

        Args:
            rows: Most rows of one forward.

        Raises:
            UserError: If they are below the number of members.
        """
        self.rows_per_forward = rows
        self._evaluator = Evaluator(
            self.backbone,
            self.attachment,
            self.layout,
            self._rewards,
            rows,
            self._overlap,
            self.balance_over,
            self.lockstep,
        )

    def start(
        self,
        prompts: Sequence[Prompt],
        forward_context: Callable[[], AbstractContextManager[object]],
        agree: Callable[[int], int],
    ) -> None:
        """Settles what waits for the device; called when a stage starts, with the networks where they will run.

        Blocks are compiled last. Trying a back end of attention and numbers of rows takes forwards of sizes that no
        later one may have, each of which would cost graphs of its own, a minute or more. Compiled blocks rarely need
        more memory than those that were measured; where they do, units are sampled in parts, as on any lack of memory.

        Args:
            prompts: All prompts of the run.
            forward_context: Surrounds forwards as the run will (autocast).
            agree: Gives all ranks the smallest of their numbers: the composition of units, and so the last bits of all
                rewards, follow from the rows of a forward.

        Raises:
            UserError: If the device cannot do what the backbone's memory options ask.
        """
        negatives = [prompt.negative for prompt in prompts] if self.guided else []
        # A test runs in inference mode, whose tensors no later training step could use.
        with torch.inference_mode(False):
            self.backbone.prepare([prompt.text for prompt in prompts], negatives)
        self._rewards.prepare(self.backbone.device)
        if self._evaluator is None:
            if self.lockstep.binds and self.backbone.device.type == "cuda":
                raise UserError(
                    "model.rows_per_forward is auto, which tries what a device takes; ranks that hold the model "
                    "together cannot try that each for itself. Give a number: plan with --device_memory estimates it."
                )
            longest = max(prompts, key=lambda prompt: len(prompt.text), default=Prompt("", 0))
            with forward_context():
                found = automatic_rows(self.backbone, self.attachment, self.layout, longest)
            self.use_rows(agree(found))
        if self.compiles and not self._is_compiled:
            compile_blocks(self.backbone.transformer)
            self._is_compiled = True
