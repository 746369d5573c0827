"""The licence of a base model, from its own files: what is made of a model is under its terms, too.

Nothing is claimed from memory. Licences change, and a wrong one on a public card is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from calibri_lightning.adapters.loading import HUB_ID
from calibri_lightning.tools.finished import Settings

TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Names of the files in a model's folder that say its terms."""
_CARD = "README.md"


@dataclass(frozen=True)
class Licence:
    """A licence, as model cards name it."""

    id: str
    """Identifier of the Hub; "other" for one that is not in its list."""
    name: str = ""
    """Name of one that is not in the list."""
    link: str = ""
    known_from: str = "the model's own card"


_EMBEDDED = Licence("apache-2.0", known_from="the licence of calibri_lightning, which the model comes with")


def licence_of(settings: Settings, folder: Path | None) -> Licence | None:
    """Finds the licence of a run's base model.

    Args:
        settings: The run's settings.
        folder: The model's folder, where it is at hand.

    Returns:
        What the model's own card says, in its folder or in the Hub's cache; None where there is no such card.
    """
    at_hand = None if folder is None else folder / _CARD
    for path in (at_hand, _cached_card(settings)):
        found = None if path is None else _from_card(path, settings)
        if found is not None:
            return found
    return _EMBEDDED if settings.pretrained == "shapes" else None


def _cached_card(settings: Settings) -> Path | None:
    """The card of a model of the Hub, where an earlier download left it; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    if Path(settings.pretrained).is_dir() or not HUB_ID.fullmatch(settings.pretrained):
        return None
    found = try_to_load_from_cache(settings.pretrained, _CARD, revision=settings.revision)
    return Path(found) if isinstance(found, str) else None


def _from_card(path: Path, settings: Settings) -> Licence | None:
    try:
        _, head, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("license"), str):
        return None
    name, link = (str(found.get(key) or "") for key in ("license_name", "license_link"))
    if link and "://" not in link and HUB_ID.fullmatch(settings.pretrained) and not Path(settings.pretrained).is_dir():
        link = f"https://huggingface.co/{settings.pretrained}/blob/main/{link}"
    return Licence(found["license"], name, link)
