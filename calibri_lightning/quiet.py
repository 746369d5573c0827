"""A terminal that shows what this program has to say."""

from __future__ import annotations

import logging
import warnings


def hide_progress_bars() -> None:
    """Leaves out the bars that diffusers and transformers draw while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def quieten() -> None:
    """Silences what says nothing to a user of this program; warnings about his own settings stay."""
    hide_progress_bars()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LightningCLI's args parameter is intended to run from within Python.*",
        # A run without validation prompts.
        ".*Total length of `list` across ranks is zero.*",
        # Lightning 2.6.6 on torch 2.13, in each broadcast, reduction and gathering.
        r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",
        ".*torch.distributed.nn.functional.all_gather is deprecated.*",
        # All ranks log the same numbers already.
        ".*It is recommended to use `self.log.* sync_dist=True.*",
        # The four below describe this design: no optimiser, a frozen model, the state after a generation, and a
        # strategy that is a callback of the module.
        ".*`LightningModule.configure_optimizers` returned `None`.*",
        ".*module\\(s\\) in eval mode at the start of training.*",
        ".*Using ModelCheckpoint with manual optimization.*",
        ".*Be aware that when using `ckpt_path`.*",
    ):
        warnings.filterwarnings("ignore", pattern)
