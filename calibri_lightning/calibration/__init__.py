"""Calibration: where a transformer is scaled, what each number means, how scales get in and out of it."""

from calibri_lightning.calibration import tables  # fills the table of block classes
from calibri_lightning.calibration.attach import Attachment, attach, probe
from calibri_lightning.calibration.document import CalibrationFile, ObtainedBy
from calibri_lightning.calibration.files import read_calibration, write_calibration
from calibri_lightning.calibration.fingerprint import ModelFingerprint, fingerprint, weights_digest
from calibri_lightning.calibration.fold import fold
from calibri_lightning.calibration.pipeline import fuse, load_calibration, unload_calibration
from calibri_lightning.calibration.restore import check_model, layout_for, load_start
from calibri_lightning.calibration.scales import Layout, Member, MemberSpec, Rows, WeightMode, build_layout
from calibri_lightning.calibration.sites import Granularity, Layer, Site, SiteOptions, Stream, find_sites
from calibri_lightning.calibration.weights import FixedWeights, WeightsRecord, base_digests, check_weights

__all__ = [
    "Attachment",
    "CalibrationFile",
    "FixedWeights",
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
    "WeightsRecord",
    "attach",
    "base_digests",
    "build_layout",
    "check_model",
    "check_weights",
    "find_sites",
    "fingerprint",
    "fold",
    "fuse",
    "layout_for",
    "load_calibration",
    "load_start",
    "probe",
    "read_calibration",
    "tables",
    "unload_calibration",
    "weights_digest",
    "write_calibration",
]
