"""The model card, README.md of an exported folder: what it is, how to load it, what it can do, at which price."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from calibri_lightning.evaluation.text import verdict
from calibri_lightning.tools.export.copying import public_name
from calibri_lightning.tools.export.licences import Licence
from calibri_lightning.tools.export.markdown import escape, source_name
from calibri_lightning.tools.export.numbers import budget_lines, number_tables
from calibri_lightning.tools.export.usage import Form, Usage, usage_lines
from calibri_lightning.tools.finished import FinishedRun, Settings
from calibri_lightning.tools.lineage import Origin

_STRATEGIES: Mapping[str, str] = {
    "CMAES": "CMA-ES on the scales (Calibri, arXiv 2603.24800), without gradients",
    "PairES": "antithetic pairs on the scales of Calibri (arXiv 2603.24800), without gradients",
    "FlowGRPO": "Flow-GRPO (arXiv 2505.05470), a policy gradient",
    "DiffusionNFT": "DiffusionNFT (arXiv 2509.16117), on noised pictures",
    "Alternate": "phases of several strategies, in turns",
}
_PLAIN_LINK = re.compile(r"https://[\w./~%+@:-]+")
"""A link that cannot end early, or be anything else."""
PICTURES: Mapping[str, str] = {
    "before_after.png": "The first test prompts before and after",
    "scales.png": "The scales that were found",
    "convergence.png": "Validation over the course of the run",
}
"""What a run may have drawn that a card shows, and what it says of it."""


@dataclass(frozen=True)
class Card:
    """What a card is written from."""

    run: FinishedRun
    form: Form
    usage: Usage
    licence: Licence | None
    prompts: tuple[str, ...] = ()
    """A few of the test prompts."""
    pictures: tuple[str, ...] = ()
    """File names of pictures beside the card."""
    commit: str | None = None
    """The commit of the base model."""
    terms: tuple[str, ...] = ()
    """File names of the base model's licence beside the card."""
    start: Origin | None = None
    """What the run started from; None for the base model."""

    def render(self) -> str:
        """Writes the card.

        Returns:
            Markdown with the Hub's YAML head, ending in a newline.
        """
        parts = [
            ["---", yaml.safe_dump(self._head(), sort_keys=False, allow_unicode=True).rstrip(), "---"],
            [f"# {escape(self.run.settings.name)}"],
            self._introduction(),
            ["## How to use it", "", *usage_lines(self.usage)],
            ["## How it was made", "", *self._method()],
            ["## What the test said", "", *self._results()],
            ["## What it cost", "", *budget_lines(self.run, self.start)],
            ["## Prompts", "", *self._prompts()],
            ["## Licence", "", *self._terms()],
        ]
        return "\n\n".join("\n".join(part) for part in parts) + "\n"

    def _head(self) -> dict[str, Any]:
        base = self.run.settings.pretrained
        licence = {} if self.licence is None else {"license": self.licence.id}
        if self.licence is not None and self.licence.id == "other":
            link = self.licence.link
            # A link to a file beside the base model's card leads nowhere where that file is not.
            reachable = link in self.terms or "://" in link
            more = {"license_name": self.licence.name, "license_link": link if reachable else ""}
            licence |= {key: value for key, value in more.items() if value}
        on_hub = "/" in base and public_name(base) == base
        relation = "finetune" if self.form == "folder" else "adapter"
        return {
            **licence,
            **({"base_model": base, "base_model_relation": relation} if on_hub else {}),
            "library_name": "diffusers" if self.form == "folder" else "calibri_lightning",
            **({"pipeline_tag": "text-to-image"} if self.usage.draws_pictures else {}),
            "tags": ["calibri", "calibri_lightning"],
        }

    def _introduction(self) -> list[str]:
        name, count = public_name(self.run.settings.pretrained), len(self.run.calibration.members)
        base = f"**{escape(name)}**{', the small model that comes with calibri_lightning,' * (name == 'shapes')}"
        if self.form == "folder":
            return [
                f"{base} with what a run found folded into its weights: an ordinary diffusers folder that needs no "
                "package beside diffusers and costs nothing extra. Everything but the transformer's numbers is the "
                "base model's."
            ]
        kind = (
            "a guided pair, one set for the prompt and one for the negative prompt"
            if self._is_pair()
            else ("one set" if count == 1 else f"an ensemble of {count} sets, each run for each picture")
        )
        return [f"Scales for {base}: {kind}. The base model itself is not in here."]

    def _is_pair(self) -> bool:
        return any(member.prompt == "negative" for member in self.run.calibration.members)

    def _method(self) -> list[str]:
        settings, file = self.run.settings, self.run.calibration
        scales = (value for name, value in zip(file.names, file.values, strict=True) if not name.endswith("/weight"))
        moved = any(value != 1.0 for value in scales)
        trained = [
            f"{len(file.values)} parameters of scales (granularity `{file.granularity}`, {len(file.members)} "
            f"member(s), weights `{file.weight_mode}`{'' if moved else '; all scales are 1'})"
        ]
        trained += ["a LoRA"] if self.run.adapter is not None else []
        trained += ["a LoRA that was merged first"] if self.run.merged is not None else []
        trained += ["all weights of the transformer"] if self.run.transformer is not None else []
        rewards = ", ".join(f"{escape(name)} (weight {weight:g})" for name, weight in settings.rewards.items())
        commit = (
            f" at commit `{self.commit}`"
            if self.commit
            else (f" at revision `{escape(settings.revision)}`" if settings.revision else "")
        )
        size = "the model's own size" if settings.size is None else f"{settings.size[0]} x {settings.size[1]} pixels"
        options = ", ".join(f"`{k}: {v}`" for k, v in settings.strategy_options.items() if type(v) in (int, float))
        return [
            f"- Method: {_method(settings)}{' (' + options + ')' if options else ''}",
            *self._started_from(),
            f"- Holds: {', '.join(trained)}",
            f"- Base model: {escape(public_name(settings.pretrained))}{commit}, {settings.dtype}",
            f"- {self._guidance()}",
            f"- Rewards: {rewards}",
            f"- Pictures: {settings.num_steps} sampling steps, {size}; seed {file.obtained_by.seed}",
            f"- Made with calibri_lightning {escape(file.obtained_by.package_version or 'of an unknown version')}",
        ]

    def _guidance(self) -> str:
        members = self.run.calibration.members
        if len(members) == 1:
            return "Guidance: none, neither in the base nor in the run: one forward a step"
        weights = ", ".join(f"{member.weight:g} ({member.prompt})" for member in members)
        return f"Members of the base, and of the run at its start, by weight: {weights}"

    def _started_from(self) -> list[str]:
        """Without it, the gains of the test would seem to be this run's alone."""
        if self.start is None:
            return []
        named = [
            f"{escape(public_name(source.name))}, of which nothing more is known here"
            if source.run is None
            else f"{escape(source.run.settings.name)}, {_method(source.run.settings)}"
            for source in self.start.sources
        ]
        return [f"- Started from: {'; '.join(named)}. What the test compares with the base is both together."]

    def _results(self) -> list[str]:
        summary = self.run.summary
        if summary is None:
            found = self.run.calibration.obtained_by
            start, best = found.start_score, found.validation_score
            known = start is not None and best is not None
            scores = (
                f" On the validation prompts, by which it was chosen: {start:.4g} before, {best:.4g} after."
                if known
                else ""
            )
            return ["No test on held-out prompts was run." + scores]
        shown = [line for name in self.pictures for line in ("", f"![{PICTURES[name]}]({name})")]
        return [escape(verdict(summary)), "", *number_tables(summary), *shown]

    def _prompts(self) -> list[str]:
        sources = self.run.settings.prompts
        what = {"train": "Found on", "val": "Chosen on", "test": "Tested on"}
        lines = [f"- {what[part]}: `{source_name(source)}`" for part, source in sources.items()]
        if self.prompts:
            lines += ["", "The first test prompts:", "", *(f"- {escape(prompt, 200)}" for prompt in self.prompts)]
        return lines or ["The run names none."]

    def _terms(self) -> list[str]:
        base, licence = escape(public_name(self.run.settings.pretrained)), self.licence
        rule = "What is made of a model is under its terms, too; this card is no legal advice."
        files = f" Its terms are beside this card: {', '.join(f'`{name}`' for name in self.terms)}." * bool(self.terms)
        if licence is None:
            return [
                f"Check the licence of {base} before you share this: the model's card was not at hand when this one "
                f"was written, so none is claimed here.{files} {rule}"
            ]
        link = f" ([text]({licence.link}))" if _PLAIN_LINK.fullmatch(licence.link) else ""
        return [f"{base}: {escape(licence.name or licence.id)}{link}, by {licence.known_from}.{files} {rule}"]


def _method(settings: Settings) -> str:
    return _STRATEGIES.get(settings.strategy, escape(settings.strategy))
