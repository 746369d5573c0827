"""Loaders of prompts: the endless, resumable one of training, and the finite one of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count as count_from

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt, PromptBatch, draw_prompts, fingerprint


class PromptTicker:
    """The endless loader of training steps: `PromptBatch(0, ...)`, `PromptBatch(1, ...)` and so on.

    Lightning saves and restores a loader that has `state_dict` and `load_state_dict`. It also fetches one
    batch ahead of the step that runs, so what was handed out says nothing about what was done: whoever runs
    the steps calls `begin`.

    Args:
        prompts: All training prompts.
        seed: The seed of the shuffles.
        count: Prompts a step.
        in_flight: Says whether the step that began last is still running: a run that is killed now must do it
            again.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, count: int, in_flight: Callable[[], bool] = lambda: False
    ) -> None:
        self._prompts = prompts
        self._seed = seed
        self._count = count
        self._in_flight = in_flight
        self._num_begun = 0

    def __iter__(self) -> Iterator[PromptBatch]:
        """Hand out batches, starting with the first step that has not begun."""
        for step in count_from(self._num_begun):
            yield PromptBatch(step, draw_prompts(self._prompts, self._seed, step, self._count))

    def begin(self, step: int) -> None:
        """Note that a step begins.

        Args:
            step: The step.
        """
        self._num_begun = step + 1

    def state_dict(self) -> dict[str, int | str]:
        """What a checkpoint keeps: how many steps are finished, and of which sequence of prompts."""
        return {"num_finished": self._num_begun - int(self._in_flight()), **self._sequence()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue after the last finished step.

        Args:
            state: What `state_dict` returned.

        Raises:
            UserError: When the checkpoint drew from other prompts, or drew them with another seed or batch
                size.
        """
        for key, value in self._sequence().items():
            if state.get(key) != value:
                raise UserError(
                    f"the checkpoint was made with {key}={state.get(key)}, this run has {key}={value}: a"
                    " resumed run must draw the same prompts. Restore the prompts, seed_everything (or"
                    " data.seed) and the strategy's batch size, or start a new run from the checkpoint's result with"
                    " model.init_from instead of --ckpt_path."
                )
        self._num_begun = int(state["num_finished"])

    def _sequence(self) -> dict[str, int | str]:
        return {
            "prompts_hash": fingerprint(self._prompts),
            "seed": self._seed,
            "prompts_per_step": self._count,
        }


class PromptChunks:
    """A loader of all prompts in batches of fixed composition; the last may be shorter, none is left out.

    Args:
        prompts: The prompts.
        step: The step of every batch: -1 validation, -2 test, -3 predict.
        size: Prompts a batch.
    """

    def __init__(self, prompts: Sequence[Prompt], step: int, size: int) -> None:
        self._batches = tuple(
            PromptBatch(step, tuple(prompts[start : start + size])) for start in range(0, len(prompts), size)
        )

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        """The batches in order."""
        return iter(self._batches)
