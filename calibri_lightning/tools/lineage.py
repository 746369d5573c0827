"""What a run stands on: the runs that it was stacked on, and what all of them cost together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibri_lightning.adapters.files import ADAPTER
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.summary import Budget
from calibri_lightning.tools.finished import CONFIG, FinishedRun, read_finished


@dataclass(frozen=True)
class Source:
    """One thing that a run started from."""

    name: str
    """As the run's configuration names it."""
    run: FinishedRun | None
    """The run that left it; None where that cannot be found."""


@dataclass(frozen=True)
class Origin:
    """What a run started from."""

    sources: tuple[Source, ...]
    budget: Budget | None
    """What they cost, and what those cost that they started from; None where a part of it is unknown."""
    images: int
    """Training pictures of those that are known."""


def total(budgets: Sequence[Budget]) -> Budget:
    """Adds budgets.

    Args:
        budgets: Any number.

    Returns:
        Their sum.
    """
    return Budget(
        sum(each.images for each in budgets),
        sum(each.forwards for each in budgets),
        sum(each.device_seconds for each in budgets),
    )


def origin(run: FinishedRun, known: Sequence[FinishedRun] = (), seen: tuple[Path, ...] = ()) -> Origin | None:
    """Finds what a run was stacked on, and what that cost.

    Args:
        run: The run.
        known: Runs that it may have started from; one whose folder was moved is found among them by its adapter.
        seen: Folders that were followed already, so that no circle is.

    Returns:
        The start; None for a run that began with the published model.
    """
    sources: list[Source] = []
    budgets: list[Budget | None] = []
    images = 0
    followed = (*seen, run.folder.resolve())
    for source in _predecessors(run, known, followed):
        sources.append(source)
        if source.run is None:
            budgets.append(None)
            continue
        before = origin(source.run, known, followed)
        images += source.run.calibration.obtained_by.images + (before.images if before is not None else 0)
        budgets += [source.run.budget] + ([before.budget] if before is not None else [])
    if not sources:
        return None
    whole = [budget for budget in budgets if budget is not None]
    return Origin(tuple(sources), total(whole) if len(whole) == len(budgets) else None, images)


def _predecessors(run: FinishedRun, known: Sequence[FinishedRun], seen: tuple[Path, ...]) -> Iterator[Source]:
    """Each part of `init_from` with the run that left it, if that can be found; a run of several parts once."""
    given = run.settings.model.get("init_from") or []
    met: list[Path] = []
    for name in [given] if isinstance(given, str) else list(given):
        path = Path(name)
        folder = next((each for each in (path, path.parent) if (each / CONFIG).is_file()), path)
        found = _among(folder, known) or _by_adapter(run, known) or _elsewhere(folder)
        if found is None:
            yield Source(name, None)
        elif found.folder.resolve() not in (*seen, *met):
            met.append(found.folder.resolve())
            yield Source(name, found)


def _among(folder: Path, known: Sequence[FinishedRun]) -> FinishedRun | None:
    return next((each for each in known if each.folder.resolve() == folder.resolve()), None)


def _elsewhere(folder: Path) -> FinishedRun | None:
    """A run on this machine; one that cannot be read has an unknown cost, and hinders nobody."""
    try:
        return read_finished(folder)
    except UserError:
        return None


def _by_adapter(run: FinishedRun, known: Sequence[FinishedRun]) -> FinishedRun | None:
    """The run that trained the adapter which this one holds still."""
    mine = run.calibration.adapter
    if mine is None or mine.source == ADAPTER:  # it trained its own, and started from another
        return None
    for other in known:
        theirs = other.calibration.adapter
        if theirs is not None and (theirs.source, theirs.sha256) == (ADAPTER, mine.sha256):
            return other
    return None
