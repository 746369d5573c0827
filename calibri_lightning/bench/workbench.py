"""What the measurements of one benchmark share: weights, sites, rewards and work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from calibri_lightning.backbones.compiling import compile_blocks
from calibri_lightning.backbones.loading import DType
from calibri_lightning.backbones.native import Native
from calibri_lightning.bench.loops import Floats, Job, batched, straightforward
from calibri_lightning.bench.models import build, twin
from calibri_lightning.bench.options import Options
from calibri_lightning.bench.precision import Setting
from calibri_lightning.calibration import WeightMode, attach, build_layout, find_sites
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.shapes.captions import prompts as captions

SIGMA0 = 0.15
"""Step size with which candidates are drawn around the start: the search's first one."""
GUIDANCE = 3.0
"""Guidance scale at the start, where there is a negative prompt."""

Loop = Callable[[Job], Floats]
"""Scores a job."""


class Workbench:
    """Builds each set of weights once; every loop gets modules of its own on them.

    Args:
        options: What to measure.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rewards = RewardSet({"shapes" if options.model == "shapes" else "jpeg_compressibility": 1.0})
        self._weights: dict[DType, Native] = {}
        self._loops: dict[Setting, Loop] = {}
        sites = find_sites(self.plain(options.settings[0]).transformer)
        weight_mode: WeightMode = "guidance" if options.members == "cfg" else "fixed"
        self.layout = build_layout(sites, "gate", options.members, GUIDANCE, weight_mode)

    def plain(self, setting: Setting) -> Native:
        """The model of a setting's weights, without hooks; not to be changed.

        Args:
            setting: The setting.

        Returns:
            The backbone.
        """
        options, dtype = self.options, setting.weights
        if dtype not in self._weights:
            self._weights[dtype] = build(options.model, dtype, options.device, options.num_blocks, options.resolution)
        return self._weights[dtype]

    def job(self, popsize: int) -> Job:
        """Draws candidates, as the search draws its first ones, and takes captions and seeds.

        Args:
            popsize: Number of candidates.

        Returns:
            The work.
        """
        known = captions("val")
        prompts = tuple(known[number % len(known)] for number in range(self.options.bucket))
        seeds = tuple(noise_seed(0, 0, prompt.index, number) for number, prompt in enumerate(prompts))
        layout, generator = self.layout, np.random.Generator(np.random.Philox(0))
        draw = SIGMA0 * layout.stds * generator.standard_normal((popsize, layout.num_parameters))
        return Job(np.clip(layout.start + draw, layout.lower, layout.upper), prompts, seeds, self.options.num_steps)

    def straightforward(self, setting: Setting) -> Loop:
        """Makes the straightforward loop.

        Args:
            setting: Its precision.

        Returns:
            The loop.
        """
        backbone, options = twin(self.plain(setting)), self.options

        def run(job: Job) -> Floats:
            with setting.active(options.device):
                return straightforward(backbone, self.layout, self.rewards, job, options.rows)

        return run

    def batched(self, setting: Setting) -> Loop:
        """Makes the batched loop of a setting, or returns the one made before.

        Args:
            setting: How it computes.

        Returns:
            The loop.
        """
        if setting not in self._loops:
            backbone, options = twin(self.plain(setting)), self.options
            attachment = attach(backbone.transformer, self.layout.sites)
            if setting.compiled:
                compile_blocks(backbone.transformer)

            def run(job: Job) -> Floats:
                with setting.active(options.device):
                    return batched(backbone, attachment, self.layout, self.rewards, job, options.rows)

            self._loops[setting] = run
        return self._loops[setting]
