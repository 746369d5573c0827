"""Readies a backbone: the weights it starts from, its LoRA, the sites to scale, and what theta means."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from calibri_lightning.adapters.files import AdapterRecord
from calibri_lightning.adapters.full import load_transformer
from calibri_lightning.adapters.loading import load_adapter
from calibri_lightning.adapters.lora import LoraOptions, add_lora
from calibri_lightning.adapters.policy import Trains
from calibri_lightning.backbones import Backbone
from calibri_lightning.calibration import (
    Attachment,
    Granularity,
    Layout,
    MemberSpec,
    SiteOptions,
    WeightMode,
    attach,
    build_layout,
    find_sites,
    probe,
)
from calibri_lightning.errors import UserError
from calibri_lightning.stacking import Start

_log = logging.getLogger(__name__)

PROBE_ROWS = 16
"""Rows of the forward that looks for sites without effect, each of which tries one site."""


@dataclass
class CalibrationConfig:
    """What is calibrated.

    Attributes:
        granularity: How sites share scales: block, layer or gate.
        members: single, cfg (prompt and negative prompt), or a number of ensemble members.
        guidance_scale: Guidance at the start, for cfg; the number means what it means to the stock pipeline.
        weight_mode: What is learned about the members' weights: fixed (nothing), raw (each) or guidance (strength and
            guidance).
        cross_attention: Scale cross-attentions that the model itself does not gate, too (Wan, LTX, Sana, PixArt).
        split_fused: Scale attention and MLP of single-stream blocks apart (FLUX and its kin).
    """

    granularity: Granularity = "gate"
    members: MemberSpec = "cfg"
    guidance_scale: float = 7.0
    weight_mode: WeightMode = "raw"
    cross_attention: bool = False
    split_fused: bool = False


def ready_network(
    transformer: nn.Module, start: Start, trains: Trains, lora: LoraOptions | None, merge_adapter: bool, seed: int
) -> AdapterRecord | None:
    """Gives a transformer the weights that a run starts from, and a LoRA where one is trained.

    Args:
        transformer: The transformer; changed in place, before anything is attached.
        start: What the run starts from.
        trains: What the run trains.
        lora: The LoRA to add where one is trained and the run starts from none.
        merge_adapter: Add the adapter of the start to the weights.
        seed: Seed of a new LoRA.

    Returns:
        The adapter that was loaded.

    Raises:
        UserError: If the start does not fit the model, or the settings contradict each other.
    """
    if merge_adapter and start.adapter is None:
        raise UserError("merge_adapter is true, but init_from brings no adapter to merge. Leave it out, or name one.")
    if lora is not None and trains not in ("lora", "both"):
        raise UserError(
            f"model.lora is given, but the strategy trains {trains}, so a new LoRA would have no effect. Remove it, "
            "or choose a strategy with train: lora or both."
        )
    if start.transformer is not None:
        load_transformer(transformer, start.transformer)
    loaded = None if start.adapter is None else load_adapter(transformer, start.adapter, merge_adapter)
    if trains in ("lora", "both"):
        if loaded is None or loaded.merged:
            add_lora(transformer, lora or LoraOptions(), seed)
        elif lora is not None:
            raise UserError(
                f"model.lora is given, but init_from brings a LoRA ({loaded.source}), with its own rank and targets, "
                "which is trained on. Remove model.lora; or set merge_adapter to true, to train a new one on top of it."
            )
    return loaded


DEFAULT_CALIBRATION = CalibrationConfig()
"""Not to be changed: the module's default, which the command line needs as an object."""


def assemble(backbone: Backbone, config: CalibrationConfig) -> tuple[Layout, Attachment]:
    """Attaches scales to every site of a backbone that has an effect.

    Args:
        backbone: The model; its transformer gets hooks.
        config: What is calibrated.

    Returns:
        The meaning of theta, and the hooks.

    Raises:
        UserError: If the transformer's blocks are unknown, or the configuration is out of its range, of what the model
            can do, or asks for sites that the transformer lacks.
    """
    backbone.check_members(config.members, config.weight_mode)
    transformer = backbone.transformer
    sites = find_sites(transformer, SiteOptions(config.cross_attention, config.split_fused))
    attachment = attach(transformer, sites)
    dead = probe(attachment, lambda: backbone.probe_forward(PROBE_ROWS))
    if dead:
        _log.warning("No effect on the output, left out: %s.", ", ".join(site.name for site in dead))
        attachment.detach()
        sites = tuple(site for site in sites if site not in dead)
        attachment = attach(transformer, sites)
    guidance = backbone.plain_guidance(config.guidance_scale)
    layout = build_layout(sites, config.granularity, config.members, guidance, config.weight_mode)
    return layout, attachment
