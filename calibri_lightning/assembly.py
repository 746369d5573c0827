"""Puts a calibration onto a backbone: finds its sites, drops those without effect, fixes what theta means."""

from __future__ import annotations

import logging
from dataclasses import dataclass

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
