"""All that a search was told: with the settings, enough to rebuild it bit for bit without a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cma
import numpy as np
import torch
from threadpoolctl import threadpool_info

from calibri_lightning.arrays import Floats
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.ledger import digest
from calibri_lightning.strategies.search import SearchCore

Settings = Mapping[str, str | int | float]

FORMAT_VERSION = 1


@dataclass
class History:
    """The generations of a search."""

    settings: Settings
    """What the search was built from."""
    rewards: list[Floats] = field(default_factory=list)
    """Rewards [K, S] of each generation; NaN = not wanted."""
    candidates: list[str] = field(default_factory=list)
    """Digest of the candidates of each generation."""
    progress: list[float] = field(default_factory=list)
    """Used share of the budget at each generation."""
    moves: dict[int, Floats] = field(default_factory=dict)
    """Where the mean was put before a generation, by its number; float64 [n]."""

    def __len__(self) -> int:
        """Number of generations told."""
        return len(self.rewards)

    @property
    def num_images(self) -> int:
        """Images judged so far: a function of what was told, whatever was repeated after a kill."""
        return sum(int((~np.isnan(rewards)).sum()) for rewards in self.rewards)

    def extended(self, candidates: str, progress: float, rewards: Floats) -> History:
        """Adds a generation.

        Args:
            candidates: Digest of its candidates.
            progress: Used share of the budget.
            rewards: Its rewards [K, S].

        Returns:
            A longer history; this one stays as it is.
        """
        return History(
            self.settings,
            [*self.rewards, rewards.copy()],
            [*self.candidates, candidates],
            [*self.progress, progress],
            dict(self.moves),
        )

    def moved(self, theta: Floats) -> History:
        """Notes that the mean is put elsewhere before the next generation.

        Args:
            theta: Where to, float64 [n].

        Returns:
            A history with that move; this one stays as it is.
        """
        return replace(self, moves={**self.moves, len(self): theta.copy()})

    def replay(self, core: SearchCore) -> list[float]:
        """Brings a fresh core to where the search was.

        Args:
            core: A core that was told nothing.

        Returns:
            sigma after each generation.

        Raises:
            UserError: If the core does not draw the recorded candidates.
        """
        sigmas = []
        for generation, rewards in enumerate(self.rewards):
            self._move(core, generation)
            if digest_candidates(core.ask(generation, self.progress[generation])) != self.candidates[generation]:
                recorded, here = self.settings["numerics"], numerics()
                raise UserError(
                    f"Generation {generation} of the checkpoint cannot be replayed: its candidates differ. "
                    f"It was made with "
                    f"{recorded}, here are {here}; a search resumes only with the same ones. Install the "
                    f"same versions and, "
                    "for another processor, set OPENBLAS_CORETYPE to the recorded BLAS kernel; or start a "
                    "new run from the "
                    "calibration found so far (init_from)."
                )
            core.tell(rewards)
            sigmas.append(core.sigma)
        self._move(core, len(self))
        return sigmas

    def _move(self, core: SearchCore, generation: int) -> None:
        if generation in self.moves:
            core.move(self.moves[generation])

    def state_dict(self) -> dict[str, Any]:
        """Gives the state as tensors, numbers and texts, which `torch.load(weights_only=True)` accepts.

        Returns:
            What `load` takes.
        """
        moves = {number: torch.from_numpy(theta.copy()) for number, theta in self.moves.items()}
        return {
            "version": FORMAT_VERSION,
            "settings": json.dumps(dict(self.settings)),
            "rewards": torch.from_numpy(np.stack(self.rewards)) if self.rewards else torch.zeros(0),
            "candidates": list(self.candidates),
            "progress": list(self.progress),
            **({"moves": moves} if moves else {}),
        }

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> History:
        """Rebuilds a history.

        Args:
            state: What `state_dict` gave.

        Returns:
            The history.

        Raises:
            UserError: If another version of the package wrote it.
        """
        if state["version"] != FORMAT_VERSION:
            raise UserError(
                f"The checkpoint's search has format {state['version']}; this version reads "
                f"{FORMAT_VERSION}. "
                "Resume with the version that wrote it, or start a new run from its calibration (init_from)."
            )
        rewards = [np.array(matrix) for matrix in state["rewards"].numpy()]
        moves = {number: theta.numpy().copy() for number, theta in state.get("moves", {}).items()}
        return cls(json.loads(state["settings"]), rewards, list(state["candidates"]), list(state["progress"]), moves)


def check_same(earlier: Settings, now: Settings) -> None:
    """Refuses to resume a run under other settings.

    Args:
        earlier: Settings of the checkpoint.
        now: Settings of this run.

    Raises:
        UserError: If one differs; the numerics may, the replay tells.
    """
    keys = [key for key in {**earlier, **now} if key != "numerics" and earlier.get(key) != now.get(key)]
    if keys:
        changes = "; ".join(f"{key} was {earlier.get(key)} and is {now.get(key)}" for key in keys)
        raise UserError(
            f"The run of the checkpoint was set up otherwise: {changes}. A run resumes only unchanged. "
            "Restore these settings, or start a new run from its calibration (init_from)."
        )


def digest_candidates(thetas: Floats) -> str:
    """Digest of candidates, bit for bit.

    Args:
        thetas: float64 [K, n].

    Returns:
        SHA-256 in hexadecimal.
    """
    return digest(str(thetas.shape), np.ascontiguousarray(thetas, dtype="<f8").tobytes())


def numerics() -> str:
    """What the last bits of a search depend on.

    Returns:
        Versions and the BLAS kernel of numpy.
    """
    kernels = [info.get("architecture", "?") for info in threadpool_info() if "numpy" in info["filepath"]]
    return f"numpy {np.__version__}, cma {cma.__version__}, BLAS kernel {'/'.join(kernels) or 'unknown'}"
