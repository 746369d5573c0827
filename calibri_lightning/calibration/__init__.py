"""Calibration: where a transformer is scaled, what each number means, how scales get in and out of it."""

from calibri_lightning.calibration import tables as _tables  # noqa: F401 - fills the table of block classes
from calibri_lightning.calibration.attach import Attachment, attach, probe
from calibri_lightning.calibration.files import (
    CalibrationFile,
    ObtainedBy,
    check_model,
    layout_for,
    read_calibration,
    write_calibration,
)
from calibri_lightning.calibration.fingerprint import ModelFingerprint, fingerprint, weights_digest
from calibri_lightning.calibration.fold import fold
from calibri_lightning.calibration.pipeline import fuse, load_calibration, unload_calibration
from calibri_lightning.calibration.scales import Layout, Member, MemberSpec, Rows, WeightMode, build_layout
from calibri_lightning.calibration.sites import Granularity, Layer, Site, SiteOptions, Stream, find_sites

__all__ = [
    "Attachment",
    "CalibrationFile",
    "Granularity",
    "Layer",
    "Layout",
    "Member",
    "MemberSpec",
    "ModelFingerprint",
    "ObtainedBy",
    "Rows",
    "Site",
    "SiteOptions",
    "Stream",
    "WeightMode",
    "attach",
    "build_layout",
    "check_model",
    "find_sites",
    "fingerprint",
    "fold",
    "fuse",
    "layout_for",
    "load_calibration",
    "probe",
    "read_calibration",
    "unload_calibration",
    "weights_digest",
    "write_calibration",
]
