"""CMA-ES on pycma behind the search protocol, with successive halving inside a generation.

pycma is told ranks, which is all that CMA-ES uses: a failed candidate is then the worst one (pycma itself
would make a NaN the median), ties never depend on an unstable sort, and halving rounds compare like with
like. Its global random state, its files, its signals file and its own stop rules are all switched off
(docs/search.md, pycma 4.5.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cma
import numpy as np
from threadpoolctl import ThreadpoolController

from calibri_lightning.arrays import Cells, Floats
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.search import (
    FAILED,
    SearchCore,
    SearchSpace,
    generation_stream,
    usable_slots,
)

LEAST_POPSIZE = 4


def official_popsize(num_parameters: int) -> int:
    """Population size of the official trainer, which is CMA-ES's default: 4 + floor(3 ln n).

    Args:
        num_parameters: Number n of parameters.

    Returns:
        Candidates of a generation.
    """
    return 4 + math.floor(3 * math.log(num_parameters))


class CMACore(SearchCore):
    """The search distribution of CMA-ES.

    Args:
        space: Start, bounds and relative step sizes (`CMA_stds`).
        seed: Seed of the run.
        sigma0: First overall step size.
        popsize: Candidates K of a generation.
        rounds: Prompt slots added in each round; after each round the better half of the candidates goes on.
            One round evaluates every candidate on every slot.
        cmean_final: Learning rate of the mean at the end of the budget; it falls linearly from 1.

    Raises:
        UserError: If there are too few candidates or parameters.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        sigma0: float,
        popsize: int,
        rounds: Sequence[int],
        cmean_final: float = 1.0,
    ) -> None:
        if popsize < LEAST_POPSIZE:
            raise UserError(
                f"popsize is {popsize}; CMA-ES ranks the candidates of a generation and needs at least "
                f"{LEAST_POPSIZE}. "
                "Set popsize higher or leave it out."
            )
        if space.num_parameters < 2:
            raise UserError(
                "The calibration has 1 parameter; CMA-ES needs at least 2. Choose a finer granularity or "
                "the strategy PairES."
            )
        super().__init__(space, seed, popsize, sum(rounds))
        self.rounds, self.cmean_final = tuple(rounds), cmean_final
        self._stream = generation_stream(seed, 0)
        self._asked: tuple[int, Floats] | None = None
        # On more threads, or another number of them, eigenvectors differ in their last bits and a replay
        # fails.
        self._threads = ThreadpoolController()
        with self._threads.limit(limits=1, user_api="blas"):
            self.es = cma.CMAEvolutionStrategy(space.start, sigma0, self._options())

    def _options(self) -> dict[str, object]:
        return {
            "popsize": self.popsize,
            "CMA_stds": self.space.stds.copy(),
            "bounds": [self.space.lower.tolist(), self.space.upper.tolist()],
            "BoundaryHandler": cma.BoundTransform,
            "randn": self._randn,
            "seed": math.nan,
            "verbose": -9,
            "signals_filename": "",  # None warns in pycma 4.5.0
            "tolfun": 0,
            "tolfunhist": 0,
            "tolx": 0,
            "tolstagnation": 0,
            "tolflatfitness": math.inf,
            "maxiter": math.inf,
        }

    def _randn(self, *shape: int) -> Floats:
        # Looked up at each call: pycma keeps this method, the stream behind it changes with the generation.
        return self._stream.standard_normal(shape)

    @property
    def mean(self) -> Floats:
        """The current mean, float64 [n], within the bounds."""
        return np.array(self.es.gp.pheno(self.es.mean, into_bounds=self.es.boundary_handler.repair), dtype=np.float64)

    @property
    def sigma(self) -> float:
        """The current overall step size."""
        return float(self.es.sigma)

    @property
    def num_cells(self) -> int:
        """Images of one complete generation."""
        return sum(width * self._active(number) for number, width in enumerate(self.rounds))

    def _active(self, number: int) -> int:
        return max(1, self.popsize >> number)

    def ask(self, generation: int, progress: float = 0.0) -> Floats:
        """Draws the candidates of a generation; asking again gives the same ones.

        Args:
            generation: Number of the generation, from 0; also the number of tells so far.
            progress: Used share of the budget, 0 .. 1; the learning rate of the mean falls with it.

        Returns:
            Candidates, float64 [K, n], within the bounds.
        """
        # Setting the option alone does nothing: the learning rate in use is a copy in es.sp.
        self.es.opts["CMA_cmean"] = 1 + (self.cmean_final - 1) * min(max(progress, 0.0), 1.0)
        self.es.sp.set(self.es.opts, self.es.popsize)
        if self._asked is None or self._asked[0] != generation:
            self._stream = generation_stream(self.seed, generation)
            with self._threads.limit(limits=1, user_api="blas"):
                self._asked = (generation, np.array(self.es.ask(), dtype=np.float64))
        return self._asked[1].copy()

    def next_cells(self, rewards: Floats) -> Cells:
        """Says which cells to evaluate next: those of the first unfinished halving round.

        Args:
            rewards: Rewards so far [K, S]: NaN = not evaluated, `FAILED` = not finite.

        Returns:
            Bool [K, S]; all False when the generation is complete.
        """
        return self._walk(rewards)[0]

    def ranking(self, rewards: Floats) -> list[int]:
        """Orders the candidates of a complete generation.

        Args:
            rewards: A complete matrix [K, S].

        Returns:
            Candidate numbers, best first. Those of a later round come before those that were dropped earlier,
            whatever their means; candidates with a failed reward come last.
        """
        return self._walk(rewards)[1]

    def _walk(self, rewards: Floats) -> tuple[Cells, list[int]]:
        wanted = np.zeros(rewards.shape, dtype=bool)
        order, failed = np.arange(self.popsize), np.zeros(self.popsize, dtype=bool)
        stop = 0
        for number, width in enumerate(self.rounds):
            active = order[: self._active(number)]
            start, stop = stop, stop + width
            block = np.zeros_like(wanted)
            block[active, start:stop] = True
            wanted = block & np.isnan(rewards)
            if wanted.any():
                break
            # Only the slots that all of these candidates share are compared.
            shared = rewards[active, :stop]
            shared = shared[:, usable_slots(shared)]
            values = shared.mean(axis=1) if shared.shape[1] else np.full(len(active), FAILED)
            failed[active] = values == FAILED
            order[: len(active)] = active[np.argsort(-values, kind="stable")]
        return wanted, [*order[~failed[order]].tolist(), *order[failed[order]].tolist()]

    def rejection(self, rewards: Floats) -> str | None:
        """Says why a generation must not be told.

        Args:
            rewards: Rewards [K, S], complete or so far.

        Returns:
            The reason as a sentence; None where there is none.
        """
        reason = super().rejection(rewards)
        if reason is None and not self.next_cells(rewards).any():
            sound = int(np.isfinite(self.fitness(rewards)).sum())
            # Failed candidates share the last rank: with more of them than half, they would enter the mean.
            if sound < self.popsize // 2:
                return f"only {sound} of {self.popsize} candidates have finite rewards (half are needed)"
        return reason

    def tell(self, rewards: Floats) -> None:
        """Moves the distribution.

        Args:
            rewards: A complete matrix [K, S] that `rejection` does not object to.
        """
        assert self._asked is not None, "tell without ask"
        ranks = np.empty(self.popsize)
        ranks[self.ranking(rewards)] = np.arange(self.popsize, dtype=np.float64)
        with self._threads.limit(limits=1, user_api="blas"):
            self.es.tell(list(self._asked[1]), ranks.tolist())
        self._asked = None
        self._means.append(self.mean)

    def _put_mean(self, theta: Floats) -> None:
        # As pycma 4.5.0 places its first mean; the evolution paths and the covariance are of displacements, not places.
        self.es.mean = np.array(self.es.gp.geno(theta.copy(), from_bounds=self.es.boundary_handler.inverse))
        self._asked = None

    def diagnostics(self) -> Mapping[str, float]:
        """Numbers worth a curve.

        Returns:
            sigma; the condition number of the covariance; the learning rate of the mean.
        """
        return {
            "sigma": self.sigma,
            "condition": float(self.es.condition_number),
            "cmean": float(self.es.sp.cmean),
        }
