"""CMA-ES as a strategy, with the published settings and with better ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.base import CalibratedModule
from calibri_lightning.strategies.budget import StopRules
from calibri_lightning.strategies.checks import check_at_least, check_positive, check_share
from calibri_lightning.strategies.cma_core import LEAST_POPSIZE, CMACore, official_popsize
from calibri_lightning.strategies.evolution import EvolutionStrategy
from calibri_lightning.strategies.history import Settings
from calibri_lightning.strategies.search import SearchSpace, search_space
from calibri_lightning.strategies.sensitivity import measurement_digest, seeded_factors

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_DEFAULT_POPSIZE = 32
_DEFAULT_CMEAN_FINAL = 0.3
_SHORT_BUDGET_IMAGES = 10_000
_PLATEAU = 0.02


class CMAES(EvolutionStrategy):
    """CMA-ES; every candidate of a generation sees the same bucket of prompts and the same noise.

    Args:
        preset: "official" is the published optimiser: sigma0 0.25, 4 + floor(3 ln n) candidates, all on 16
            prompts, one step size for all parameters. "default" has a smaller sigma0, smaller steps for
            member weights, 32 candidates with halving and a learning rate of the mean that falls (R2 of
            docs/search.md).
        sigma0: First step size of a scale. Default: 0.1, or 0.2 for budgets up to 10,000 images.
        popsize: Candidates of a generation, at least 4.
        bucket_size: Prompts of a generation.
        halving: Prompts added in each round of a generation, bucket_size together; after each round the
            better half of the candidates goes on. [16] turns halving off. Default: a quarter, a quarter and a
            half of the bucket.
        cmean_final: Learning rate of the mean at the end of the budget, above 0 and at most 1; it falls from
            1.
        weight_std: Step size of raw member weights relative to that of scales; refused where none is learned.
            Default: 0.2, or 1 with preset official.
        sigma_from: A sensitivity.json of `ablate --by` this granularity: the first step size of a scale is then
            proportional to 1 / how far it moves the picture, a third to 3 times what it would be. Default: equal steps.
        sigma_plateau: End when sigma has stayed within 2 % for so many generations.
        max_images: End before this many training images are exceeded.
        max_seconds: End after so many seconds of training, resumed parts included.
        patience: End after so many validations in a row without a better score.

    Raises:
        UserError: If a setting is out of its range.
    """

    def __init__(
        self,
        preset: Literal["default", "official"] = "default",
        sigma0: float | None = None,
        popsize: int | None = None,
        bucket_size: int = 16,
        halving: list[int] | None = None,
        cmean_final: float | None = None,
        weight_std: float | None = None,
        sigma_from: str | None = None,
        sigma_plateau: int | None = None,
        max_images: int | None = None,
        max_seconds: float | None = None,
        patience: int | None = None,
    ) -> None:
        super().__init__(StopRules(max_images, max_seconds, patience))
        if preset not in ("default", "official"):
            raise UserError(f'preset is "{preset}"; it must be "default" or "official". Choose one of them.')
        check_positive("sigma0", sigma0)
        check_positive("weight_std", weight_std)
        check_share("cmean_final", cmean_final)
        check_at_least("popsize", popsize, LEAST_POPSIZE, "CMA-ES ranks the candidates of a generation")
        check_at_least("bucket_size", bucket_size, 1, "it is a number of prompts")
        check_at_least("sigma_plateau", sigma_plateau, 2, "it is a number of generations to compare")
        self.preset, self.sigma0, self.popsize, self.bucket_size = preset, sigma0, popsize, bucket_size
        self.rounds = _rounds(bucket_size, halving, preset)
        self.cmean_final = cmean_final or (1.0 if preset == "official" else _DEFAULT_CMEAN_FINAL)
        self.weight_std, self.sigma_from, self.sigma_plateau = weight_std, sigma_from, sigma_plateau

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit; a file of step sizes that does not fit is refused before anything is drawn."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.sigma_from is not None:
            self.space(cast(CalibratedModule, pl_module))

    @property
    def prompts_per_step(self) -> int:
        """Prompts that one generation takes."""
        return self.bucket_size

    @property
    def has_other_rule(self) -> bool:
        """Whether something other than the budget ends the search."""
        return self.sigma_plateau is not None

    def num_cells(self, num_parameters: int) -> int:
        """Counts the images of a generation.

        Args:
            num_parameters: Number n of parameters.

        Returns:
            Images.
        """
        return sum(self.round_sizes(num_parameters))

    def round_sizes(self, num_parameters: int) -> tuple[int, ...]:
        """Counts the images of each halving round.

        Args:
            num_parameters: Number n of parameters.

        Returns:
            Images of each.
        """
        popsize = self._popsize(num_parameters)
        return tuple(width * max(1, popsize >> number) for number, width in enumerate(self.rounds))

    def resolve(self, num_parameters: int, total_images: int | None, earlier: Settings) -> Settings:
        """Fixes the settings that were left open.

        Args:
            num_parameters: Number n of parameters.
            total_images: Images of the budget, where known.
            earlier: Settings of the checkpoint that is resumed; empty for a new run.

        Returns:
            All settings of the search.
        """
        sigma0 = self.sigma0
        if sigma0 is None and "sigma0" in earlier:
            # It depends on the budget, which may be extended on resuming.
            sigma0 = float(earlier["sigma0"])
        if sigma0 is None:
            short = total_images is not None and total_images <= _SHORT_BUDGET_IMAGES
            sigma0 = 0.25 if self.preset == "official" else 0.2 if short else 0.1
        return {
            "sigma0": sigma0,
            "popsize": self._popsize(num_parameters),
            "halving": "+".join(map(str, self.rounds)),
            "cmean_final": self.cmean_final,
            **({} if self.sigma_from is None else {"sigma_from": measurement_digest(self.sigma_from)}),
        }

    def space(self, module: CalibratedModule) -> SearchSpace:
        """Gives the search space.

        Args:
            module: The module that is trained.

        Returns:
            Start, bounds and relative step sizes; all steps are equal in the official preset, unless measured.

        Raises:
            UserError: If sigma_from does not fit the module.
        """
        layout = module.layout
        stds = np.ones(len(layout.names)) if self.preset == "official" else layout.stds
        if self.sigma_from is not None:
            stds = stds * seeded_factors(self.sigma_from, layout, module.engine.backbone.transformer)
        return search_space(layout.names, module.start_theta, layout.lower, layout.upper, stds, self.weight_std)

    def build_core(self, space: SearchSpace, seed: int, settings: Settings) -> CMACore:
        """Makes the core.

        Args:
            space: Start, bounds and relative step sizes.
            seed: Seed of the run.
            settings: What `resolve` gave.

        Returns:
            A core that was told nothing.
        """
        popsize = self._popsize(space.num_parameters)
        return CMACore(space, seed, float(settings["sigma0"]), popsize, self.rounds, self.cmean_final)

    def plateau(self, sigmas: list[float]) -> str | None:
        """Says whether the step size has stopped moving.

        Args:
            sigmas: sigma after each generation.

        Returns:
            The reason to stop; None to go on.
        """
        count = self.sigma_plateau
        if count is None or len(sigmas) < count:
            return None
        last = sigmas[-count:]
        flat = max(last) <= (1 + _PLATEAU) * min(last)
        return f"sigma has stayed within {_PLATEAU:.0%} for {count} generations" if flat else None

    def _popsize(self, num_parameters: int) -> int:
        if self.popsize is not None:
            return self.popsize
        return official_popsize(num_parameters) if self.preset == "official" else _DEFAULT_POPSIZE


def _rounds(bucket_size: int, halving: Sequence[int] | None, preset: str) -> tuple[int, ...]:
    if halving is None and (preset == "official" or bucket_size < 4):
        return (bucket_size,)
    if halving is None:
        quarter = bucket_size // 4
        return (quarter, quarter, bucket_size - 2 * quarter)
    if not halving or any(width < 1 for width in halving) or sum(halving) != bucket_size:
        raise UserError(
            f"halving is {list(halving)} with bucket_size {bucket_size}; it lists the prompts added in each "
            f"round, each at "
            f"least 1 and {bucket_size} together. Change one of the two; [{bucket_size}] turns halving off."
        )
    return tuple(halving)
