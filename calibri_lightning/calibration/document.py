"""What a calibration says: names and values, the model that they belong to, how they were obtained; checked in full.

It holds no time stamp, so that an interrupted and resumed run writes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from calibri_lightning.adapters.files import AdapterRecord
from calibri_lightning.calibration import official_record
from calibri_lightning.calibration.fingerprint import ModelFingerprint
from calibri_lightning.calibration.official_record import OfficialRecord
from calibri_lightning.calibration.scales import Member, WeightMode, choose
from calibri_lightning.calibration.sites import DEFAULT_OPTIONS, Granularity, SiteOptions
from calibri_lightning.calibration.weights import WeightsRecord
from calibri_lightning.errors import UserError

FORMAT = "calibri_lightning.calibration"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ObtainedBy:
    """How a calibration was obtained; for people, not compared."""

    strategy: str = ""
    reward: str = ""
    num_steps: int = 0
    """Sampling steps of the pictures that were scored."""
    images: int = 0
    """Training pictures judged, the same after any kill and resume."""
    seed: int = 0
    start_score: float | None = None
    """Validation score of the untouched model."""
    validation_score: float | None = None
    """Validation score of these values."""
    package_version: str = ""


@dataclass(frozen=True)
class CalibrationFile:
    """The content of a `calibration.json`."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    granularity: Granularity
    members: tuple[Member, ...]
    weight_mode: WeightMode
    model: ModelFingerprint
    obtained_by: ObtainedBy = field(default_factory=ObtainedBy)
    site_options: SiteOptions = DEFAULT_OPTIONS
    """`Layout.site_options`. The names say it too, but not where a whole block shares one scale."""
    adapter: AdapterRecord | None = None
    """The adapter that acted while these values were found, or were trained along with."""
    weights: WeightsRecord | None = None
    """The weights under these values, where they are not those of the published model."""
    official: OfficialRecord | None = None
    """The rest of the official checkpoint that these values were converted from."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If names and values do not pair up, a value is not finite, or a choice is unknown.
        """
        if len(self.names) != len(self.values) or len(set(self.names)) != len(self.names):
            raise UserError(
                f"A calibration has {len(set(self.names))} different names and {len(self.values)} values. "
                "The rule is one value a name; take the names from layout.names."
            )
        for name, value in zip(self.names, self.values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"The value of {name} is {value}. Every value of a calibration is a finite number. The "
                    "run that made it broke: use its best validated vector, or run again."
                )
        choose("granularity", self.granularity, ("block", "layer", "gate"))
        choose("weight_mode", self.weight_mode, ("fixed", "raw", "guidance"))

    @property
    def sha256(self) -> str:
        """Tells this answer from others: a digest of all but how it was obtained."""
        return hashlib.sha256(to_json(replace(self, obtained_by=ObtainedBy())).encode()).hexdigest()


def to_json(file: CalibrationFile) -> str:
    """Writes a calibration as strict JSON.

    Args:
        file: The calibration.

    Returns:
        Indented JSON text, ending in a newline. `from_json` gives the calibration back.
    """
    document = {
        "format": FORMAT,
        "format_version": file.format_version,
        "model": asdict(file.model),
        **({"adapter": asdict(file.adapter)} if file.adapter is not None else {}),
        **({"weights": asdict(file.weights)} if file.weights is not None else {}),
        **({"official": official_record.to_document(file.official)} if file.official is not None else {}),
        "granularity": file.granularity,
        "weight_mode": file.weight_mode,
        "members": [asdict(member) for member in file.members],
        "site_options": asdict(file.site_options),
        "obtained_by": asdict(file.obtained_by),
        "values": dict(zip(file.names, map(float, file.values), strict=True)),
    }
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> CalibrationFile:
    """Reads and checks a calibration.

    Args:
        text: What `to_json` wrote.

    Returns:
        The calibration.

    Raises:
        JSONDecodeError: If the text is not JSON.
        UserError: If it is not a calibration, of another version, cut short, or holds a bad value.
    """
    document = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(
            f"This is JSON, but not a calibration: its format is not {FORMAT!r}. Give the calibration.json "
            "that a run wrote."
        )
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"The file has format_version {version!r}. This calibri_lightning reads version "
            f"{FORMAT_VERSION}. Install the version of calibri_lightning that wrote it, or convert it there."
        )
    values = {name: _number(value, name) for name, value in _get(document, "values", dict).items()}
    members = tuple(_member(member, f"members[{i}]") for i, member in enumerate(_get(document, "members", list)))
    model = _get(document, "model", dict)
    return CalibrationFile(
        names=tuple(values),
        values=tuple(values.values()),
        granularity=cast(Granularity, _get(document, "granularity", str)),
        members=members,
        weight_mode=cast(WeightMode, _get(document, "weight_mode", str)),
        model=ModelFingerprint(
            _get(model, "transformer_class", str, "model"),
            _get(model, "num_parameters", int, "model"),
            _get(model, "sites_hash", str, "model"),
            _get(model, "name", str, "model"),
        ),
        obtained_by=_obtained_by(_get(document, "obtained_by", dict)),
        site_options=_site_options(document.get("site_options", {})),
        adapter=_adapter(document["adapter"]) if "adapter" in document else None,
        weights=_weights(document["weights"]) if "weights" in document else None,
        official=official_record.from_document(document["official"]) if "official" in document else None,
    )


def _member(document: object, where: str) -> Member:
    if not isinstance(document, dict):
        raise UserError(f'{where} is {document!r}. A member looks like {{"prompt": "prompt", "weight": 1.0}}.')
    prompt = _get(document, "prompt", str, where)
    choose(f"prompt of {where}", prompt, ("prompt", "negative"))
    return Member(cast(Any, prompt), _number(document.get("weight"), f"{where}.weight"))


def _adapter(document: object) -> AdapterRecord:
    """Files of a model without an adapter have none."""
    if not isinstance(document, dict):
        raise UserError(
            f"The adapter is {document!r}, and must say source, sha256 and merged. The file was edited or cut: use the "
            "original."
        )
    return AdapterRecord(
        _get(document, "source", str, "adapter"),
        _get(document, "sha256", str, "adapter"),
        _get(document, "merged", bool, "adapter"),
    )


def _weights(document: object) -> WeightsRecord:
    """Files of the published weights have none."""
    digests = document.get("digests") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(digests, list) or not all(isinstance(d, str) for d in digests):
        raise UserError(
            f"The weights are {document!r}, and must say digests, transformer and merged. The file was edited or cut: "
            "use the original."
        )
    return WeightsRecord(
        tuple(digests), _get(document, "transformer", str, "weights"), _get(document, "merged", str, "weights")
    )


def _site_options(document: object) -> SiteOptions:
    """Files from before there were options have none."""
    known = set(SiteOptions.__dataclass_fields__)
    if (
        not isinstance(document, dict)
        or not set(document) <= known
        or not all(isinstance(value, bool) for value in document.values())
    ):
        raise UserError(
            f"The site_options are {document!r}. They are true or false for each of {', '.join(sorted(known))}. The "
            "file was edited, or a later calibri_lightning wrote it: use the original, or upgrade."
        )
    return SiteOptions(**document)


def _obtained_by(document: Mapping[str, Any]) -> ObtainedBy:
    known = ObtainedBy.__dataclass_fields__
    # Later releases may tell more about a run; what this one does not know, it need not understand.
    return ObtainedBy(**{key: value for key, value in document.items() if key in known})


def _get(document: Mapping[str, Any], key: str, kind: type, where: str = "the file") -> Any:
    value = document.get(key)
    if not isinstance(value, kind):
        raise UserError(
            f"{key!r} of {where} is {value!r}, and must be a {kind.__name__}. The file was edited or cut: "
            "use the original."
        )
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"The value of {name} is {value!r}. Every value of a calibration is a finite number. The file "
            "was edited, or the run that made it broke: use the original, or run again."
        )
    return float(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{twice!r} is there twice. Each name stands once: use the original file.")
    return document
