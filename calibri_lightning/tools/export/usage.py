"""How a model card says that an export is loaded and called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from calibri_lightning.calibration.conventions import Convention
from calibri_lightning.tools.export.copying import public_name
from calibri_lightning.tools.export.parts import MERGED
from calibri_lightning.tools.finished import FinishedRun

Form = Literal["folder", "calibration"]

PARTS = "calibration"
"""Where a folded folder keeps the scales that are in its weights, for whoever wants them apart."""
_PLACE = "path/to/this/folder"
_GUIDED = 4.0
"""Some guidance that is on, where the run says none."""


@dataclass(frozen=True)
class Usage:
    """What the snippets depend on."""

    run: FinishedRun
    form: Form
    convention: Convention | None
    """How the base model's pipeline guides; None where that is not known."""
    repo_id: str | None = None
    """The repository that the folder is pushed to."""
    has_parts: bool = False
    """Whether a folded folder also holds the scales."""

    @property
    def draws_pictures(self) -> bool:
        """Whether the base is known to be a text-to-image model."""
        return self.convention is not None

    @property
    def dtype(self) -> str:
        """The type that the run drew in."""
        return f"torch.{self.run.settings.dtype}"


def usage_lines(usage: Usage) -> list[str]:
    """Writes the snippets.

    Args:
        usage: What they depend on.

    Returns:
        Lines of Markdown.
    """
    if usage.form == "calibration":
        return _hooked(usage, _fetched(usage, None))
    lines = [
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({_quoted(usage.repo_id or _PLACE)}, dtype={usage.dtype})",
        _call(usage),
        "```",
    ]
    if usage.has_parts:
        lines += [
            "",
            "Or keep the base model's weights and put the scales on with hooks, which come off again. Load the",
        ]
        lines += ["base model for that, never this folder: the scales would act twice.", ""]
        lines += _hooked(usage, _fetched(usage, PARTS))
    return lines


def _hooked(usage: Usage, fetched: list[str]) -> list[str]:
    run = usage.run
    adapters = ["load_transformer"] * (run.transformer is not None) + ["load_adapter"] * (run.merged is not None)
    return [
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        *(["from huggingface_hub import snapshot_download"] if usage.repo_id else []),
        "from calibri_lightning import load_calibration  # the package calibri_lightning",
        *([f"from calibri_lightning.adapters import {', '.join(adapters)}"] if adapters else []),
        *(["from calibri_lightning.backbones.loading import SHAPES_FOLDER"] if _is_embedded(run) else []),
        "",
        f"pipe = DiffusionPipeline.from_pretrained({_base(run)}, dtype={usage.dtype}{_revision(run)})",
        *fetched,
        *(['load_transformer(pipe.transformer, f"{folder}/transformer")'] if run.transformer is not None else []),
        *([f'load_adapter(pipe.transformer, f"{{folder}}/{MERGED}", merge=True)'] if run.merged is not None else []),
        "load_calibration(pipe, folder)",
        _call(usage),
        "```",
        *_guidance_note(usage),
    ]


def _fetched(usage: Usage, inside: str | None) -> list[str]:
    """Lines that put the folder of the scales into `folder`."""
    if usage.repo_id is None:
        return [f"folder = {_quoted(_PLACE + ('' if inside is None else '/' + inside))}"]
    patterns = "" if inside is None else f", allow_patterns={_quoted(inside + '/*')}"
    fetched = f"snapshot_download({_quoted(usage.repo_id)}{patterns})"
    return [f"folder = {fetched}" + ("" if inside is None else f" + {_quoted('/' + inside)}")]


def _call(usage: Usage) -> str:
    settings = usage.run.settings
    arguments = [f"num_inference_steps={settings.num_steps}", *_guidance(usage)]
    if settings.embedded_guidance is not None:
        arguments.append(f"guidance_scale={settings.embedded_guidance:g}")
    if settings.size is not None:
        arguments += [f"height={settings.size[0]}", f"width={settings.size[1]}"]
    call = f'pipe("a prompt", {", ".join(arguments)})'
    return f"image = {call}.images[0]" if usage.draws_pictures else f"result = {call}"


def _guidance(usage: Usage) -> list[str]:
    """The arguments that guide as the run did."""
    convention, members = usage.convention, usage.run.calibration.members
    if convention is None or convention.negative == "nowhere":
        return []
    if any(member.prompt == "negative" for member in members):
        own = convention.own_guidance(members[0].weight)
        guidance = own if own > 1.0 else _GUIDED
        if convention.says_guidance:
            return [f"guidance_scale={guidance:g}"]
        return [f"true_cfg_scale={guidance:g}", 'negative_prompt=" "']
    return [f"guidance_scale={convention.own_guidance(1.0):g}"] if convention.says_guidance else []


def _guidance_note(usage: Usage) -> list[str]:
    convention = usage.convention
    pair = any(member.prompt == "negative" for member in usage.run.calibration.members)
    if convention is None or not pair:
        return []
    return ["", f"The pair brings its own guidance: call with {convention.switch}, the pictures are the same."]


def _base(run: FinishedRun) -> str:
    """The base model, as the argument of from_pretrained."""
    name = run.settings.pretrained
    if _is_embedded(run):
        return "str(SHAPES_FOLDER)"
    shown = public_name(name)
    return _quoted(name if shown == name else f"path/to/{shown}")


def _is_embedded(run: FinishedRun) -> bool:
    return run.settings.pretrained == "shapes"


def _revision(run: FinishedRun) -> str:
    return "" if run.settings.revision is None else f", revision={_quoted(run.settings.revision)}"


def _quoted(text: str) -> str:
    """A Python string: JSON's are."""
    return json.dumps(text, ensure_ascii=False)
