"""Antithetic pairs with Adam as a strategy."""

from __future__ import annotations

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.base import CalibratedModule
from calibri_lightning.strategies.budget import StopRules
from calibri_lightning.strategies.checks import check_at_least, check_positive, check_share
from calibri_lightning.strategies.evolution import EvolutionStrategy
from calibri_lightning.strategies.history import Settings
from calibri_lightning.strategies.pair_core import PairCore
from calibri_lightning.strategies.search import SearchSpace, search_space


class PairES(EvolutionStrategy):
    """Pairs of candidates on opposite sides of the mean; each pair has prompts and noise of its own.

    P2 of docs/search.md.

    Args:
        num_pairs: Pairs of a generation; it takes 2 x num_pairs x prompts_per_pair images.
        prompts_per_pair: Prompts of each pair.
        sigma0: Step size of a scale at which pairs are tried; it stays as it is.
        lr: Adam's step of a scale; other parameters step by this times their relative step size.
        betas: Adam's decay rates of the gradient and of its square.
        final_lr_fraction: Share of lr left at the end of the budget, above 0 and at most 1; it falls
            linearly.
        weight_std: Step size of raw member weights relative to that of scales; refused where none is learned.
            Default: 0.2.
        max_images: End before this many training images are exceeded.
        max_seconds: End after so many seconds of training, resumed parts included.
        patience: End after so many validations in a row without a better score.

    Raises:
        UserError: If a setting is out of its range.
    """

    def __init__(
        self,
        num_pairs: int = 16,
        prompts_per_pair: int = 4,
        sigma0: float = 0.15,
        lr: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.99),
        final_lr_fraction: float = 0.05,
        weight_std: float | None = None,
        max_images: int | None = None,
        max_seconds: float | None = None,
        patience: int | None = None,
    ) -> None:
        super().__init__(StopRules(max_images, max_seconds, patience))
        check_at_least("num_pairs", num_pairs, 1, "a generation is made of pairs")
        check_at_least("prompts_per_pair", prompts_per_pair, 1, "a pair is judged on prompts")
        check_positive("sigma0", sigma0)
        check_positive("lr", lr)
        check_positive("weight_std", weight_std)
        check_share("final_lr_fraction", final_lr_fraction)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                f"betas is {tuple(betas)}; Adam takes two decay rates, each at least 0 and below 1. For "
                f"example (0.9, 0.99)."
            )
        self.num_pairs, self.prompts_per_pair, self.sigma0 = num_pairs, prompts_per_pair, sigma0
        self.lr, self.betas, self.final_lr_fraction = lr, (betas[0], betas[1]), final_lr_fraction
        self.weight_std = weight_std

    @property
    def prompts_per_step(self) -> int:
        """Prompts that one generation takes."""
        return self.num_pairs * self.prompts_per_pair

    def num_cells(self, num_parameters: int) -> int:
        """Counts the images of a generation.

        Args:
            num_parameters: Number n of parameters.

        Returns:
            Images.
        """
        return 2 * self.prompts_per_step

    def resolve(self, num_parameters: int, total_images: int | None, earlier: Settings) -> Settings:
        """Gives the settings; none was left open.

        Args:
            num_parameters: Number n of parameters.
            total_images: Images of the budget, where known.
            earlier: Settings of the checkpoint that is resumed; empty for a new run.

        Returns:
            All settings of the search.
        """
        return {
            "num_pairs": self.num_pairs,
            "prompts_per_pair": self.prompts_per_pair,
            "sigma0": self.sigma0,
            "lr": self.lr,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "final_lr_fraction": self.final_lr_fraction,
        }

    def space(self, module: CalibratedModule) -> SearchSpace:
        """Gives the search space.

        Args:
            module: The module that is trained.

        Returns:
            Start, bounds and relative step sizes.
        """
        layout = module.layout
        return search_space(layout.names, module.start_theta, layout.lower, layout.upper, layout.stds, self.weight_std)

    def build_core(self, space: SearchSpace, seed: int, settings: Settings) -> PairCore:
        """Makes the core.

        Args:
            space: Start, bounds and relative step sizes.
            seed: Seed of the run.
            settings: What `resolve` gave.

        Returns:
            A core that was told nothing.
        """
        return PairCore(
            space,
            seed,
            self.sigma0,
            self.num_pairs,
            self.prompts_per_pair,
            self.lr,
            self.betas,
            self.final_lr_fraction,
        )
