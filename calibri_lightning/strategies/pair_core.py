"""Antithetic pairs with Adam: an evolution strategy that cancels the difficulty of prompts.

P2 of docs/search.md. Pair i is m + sigma s z_i and m - sigma s z_i (s = relative step sizes). Both
are judged on prompts and noise of their own, which no other pair sees: a generation visits many prompts. The
gradient estimate is g = mean_i (r_i+ - r_i-) / 2 * z_i, in units of z; Adam then moves the mean by
s * lr * m_hat / sqrt(v_hat): lr is the length of a coordinate's step in units of its relative step size s.
"""

from __future__ import annotations

import numpy as np

from calibri_lightning.arrays import Cells, Floats
from calibri_lightning.strategies.search import (
    SearchCore,
    SearchSpace,
    generation_stream,
    usable_slots,
)

_EPSILON = 1e-12


class PairCore(SearchCore):
    """A Gaussian of constant width whose mean climbs by Adam.

    Args:
        space: Start, bounds and relative step sizes.
        seed: Seed of the run.
        sigma0: Overall step size, constant.
        num_pairs: Pairs of a generation; K is twice this.
        prompts_per_pair: Prompt slots of each pair; S is num_pairs times this.
        lr: First step of a coordinate in units of its relative step size.
        betas: Adam's decay rates of the gradient and of its square.
        final_lr_fraction: Share of lr left at the end of the budget; it falls linearly.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        sigma0: float,
        num_pairs: int,
        prompts_per_pair: int,
        lr: float,
        betas: tuple[float, float],
        final_lr_fraction: float,
    ) -> None:
        super().__init__(space, seed, 2 * num_pairs, num_pairs * prompts_per_pair)
        self.num_pairs, self.prompts_per_pair = num_pairs, prompts_per_pair
        self.lr, self.betas, self.final_lr_fraction = lr, betas, final_lr_fraction
        self._sigma = sigma0
        self._mean = space.start.copy()
        self._first = np.zeros_like(self._mean)
        self._second = np.zeros_like(self._mean)
        self._asked: tuple[Floats, float] | None = None

    @property
    def mean(self) -> Floats:
        """The current mean, float64 [n], within the bounds."""
        return self._mean.copy()

    @property
    def sigma(self) -> float:
        """The overall step size, constant."""
        return self._sigma

    @property
    def num_cells(self) -> int:
        """Images of one complete generation."""
        return 2 * self.num_slots

    def ask(self, generation: int, progress: float = 0.0) -> Floats:
        """Draws the candidates of a generation; asking again gives the same ones.

        Args:
            generation: Number of the generation, from 0; also the number of tells so far.
            progress: Used share of the budget, 0 .. 1; the learning rate falls with it.

        Returns:
            Candidates, float64 [K, n]: rows 2i and 2i + 1 are pair i. A value beyond a bound is put on the
            bound; reflected, both of a pair could end on the same side of the mean.
        """
        z = generation_stream(self.seed, generation).standard_normal((self.num_pairs, self._mean.size))
        progress = min(max(progress, 0.0), 1.0)
        self._asked = (z, self.lr * (1 - (1 - self.final_lr_fraction) * progress))
        step = self._sigma * self.space.stds * z
        pairs = np.stack([self._mean + step, self._mean - step], axis=1)
        return np.clip(pairs.reshape(self.popsize, -1), self.space.lower, self.space.upper)

    def next_cells(self, rewards: Floats) -> Cells:
        """Says which cells to evaluate next: each pair's own slots.

        Args:
            rewards: Rewards so far [K, S]: NaN = not evaluated, `FAILED` = not finite.

        Returns:
            Bool [K, S]; all False when the generation is complete.
        """
        own = np.kron(np.eye(self.num_pairs, dtype=bool), np.ones((2, self.prompts_per_pair), dtype=bool))
        return own & np.isnan(rewards)

    def tell(self, rewards: Floats) -> None:
        """Moves the mean by one Adam step.

        Args:
            rewards: A complete matrix [K, S] that `rejection` does not object to.
        """
        assert self._asked is not None, "tell without ask"
        z, lr = self._asked
        gradient = self._gradient(rewards, z)
        self._asked = None
        beta1, beta2 = self.betas
        self._first = beta1 * self._first + (1 - beta1) * gradient
        self._second = beta2 * self._second + (1 - beta2) * gradient**2
        count = len(self._means) + 1
        direction = (self._first / (1 - beta1**count)) / (np.sqrt(self._second / (1 - beta2**count)) + _EPSILON)
        self._mean = np.clip(self._mean + lr * self.space.stds * direction, self.space.lower, self.space.upper)
        self._means.append(self.mean)

    def _put_mean(self, theta: Floats) -> None:
        self._mean = theta.copy()

    def _gradient(self, rewards: Floats, z: Floats) -> Floats:
        # Where one of a pair failed and the other did not, the candidate is to blame: it counts as the worst
        # reward seen.
        filled = np.where(np.isneginf(rewards), rewards[np.isfinite(rewards)].min(), rewards)
        lost = ~usable_slots(rewards)
        gradients = []
        for i in range(self.num_pairs):
            slots = np.arange(i * self.prompts_per_pair, (i + 1) * self.prompts_per_pair)
            slots = slots[~lost[slots]]
            if slots.size:
                gradients.append((filled[2 * i, slots] - filled[2 * i + 1, slots]).mean() / 2 * z[i])
        return np.mean(gradients, axis=0)
