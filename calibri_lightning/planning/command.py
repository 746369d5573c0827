"""The command `plan`: reads the configuration of a fit and says what it will need, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from calibri_lightning.adapters.lora import LoraOptions
from calibri_lightning.assembly import CalibrationConfig
from calibri_lightning.backbones.memory import MemoryOptions
from calibri_lightning.backbones.native import Native
from calibri_lightning.calibration import SiteOptions, build_layout, find_sites
from calibri_lightning.cli import parse_fit, run
from calibri_lightning.commandline import exit_code
from calibri_lightning.data import PromptData
from calibri_lightning.errors import UserError
from calibri_lightning.planning.configured import class_of
from calibri_lightning.planning.estimate import MemoryPlan, Situation, make_plan
from calibri_lightning.planning.shards import ShardPlan, read_ranks
from calibri_lightning.planning.sketch import sketch_pipeline
from calibri_lightning.planning.training import TrainingPlan, read_training
from calibri_lightning.prompts import read_prompts
from calibri_lightning.sampling.rows import MOST_ROWS
from calibri_lightning.stacking import parse_start

USAGE = """usage: calibri_lightning plan --config FILE [--key value ...] [--json] [--device_memory GIB]

Prints what each process of a fit will need: parameters, embeddings, activations and the expected peak of its device.
Nothing is loaded, downloaded or written; a model of the Hub needs its small files in the local cache, and prompts of
the Hub (hf:) are not counted.

  --json                 print JSON
  --device_memory GIB    memory of the device, for which rows_per_forward: auto is estimated

All other options are those of fit:
"""


def run_plan(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: What follows the word plan.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, flush=True)
        return run(["fit", "--help"])
    return exit_code(lambda: _plan(arguments))


def _plan(arguments: Sequence[str]) -> None:
    as_json, memory, rest = _own_options(arguments)
    plan, heading = plan_fit(parse_fit(rest), memory)
    print(json.dumps(to_json(plan, heading), indent=2) if as_json else render(plan, heading))


def _own_options(arguments: Sequence[str]) -> tuple[bool, int | None, list[str]]:
    """Takes out the options of plan: whether JSON is wanted, bytes of the device, and the rest."""
    words = [part for word in arguments for part in _split(word)]
    as_json = "--json" in words
    rest = [word for word in words if word != "--json"]
    if "--device_memory" not in rest:
        return as_json, None, rest
    at = rest.index("--device_memory")
    try:
        gib = float(rest[at + 1])
    except (IndexError, ValueError):
        gib = 0.0
    if gib <= 0:
        raise UserError("--device_memory takes a number of GiB above 0, such as 80.")
    return as_json, int(gib * 2**30), rest[:at] + rest[at + 2 :]


def _split(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if name == "--device_memory" and equals else [word]


def plan_fit(config: dict[str, Any], device_bytes: int | None = None) -> tuple[MemoryPlan, str]:
    """Plans a fit.

    Args:
        config: Its configuration, parsed.
        device_bytes: Memory of the device.

    Returns:
        The plan, and what it is for in one line.

    Raises:
        UserError: If the configuration names a backbone that cannot be planned, or something that is not there.
    """
    model = config["model"]
    backbone = _sketch_backbone(model["backbone"])
    calibration = CalibrationConfig(**model["calibration"])
    backbone.check_members(calibration.members, calibration.weight_mode)
    sites = find_sites(backbone.transformer, SiteOptions(calibration.cross_attention, calibration.split_fused))
    guidance = backbone.plain_guidance(calibration.guidance_scale)
    layout = build_layout(sites, calibration.granularity, calibration.members, guidance, calibration.weight_mode)
    num_texts = _count_texts(config["data"], any(member.prompt == "negative" for member in layout.members))
    accelerator, rows = config["trainer"]["accelerator"], model["rows_per_forward"]
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and device_bytes is None and not torch.cuda.is_available())
    most = (MOST_ROWS if rows == "auto" else int(rows)) // len(layout.members)
    situation = Situation(
        layout,
        None if rows == "auto" else int(rows),
        num_texts,
        on_cpu,
        None if on_cpu else device_bytes,
        _concurrency(model["rewards"]) if model["overlap_scoring"] else 0,
        read_training(model, max(1, most)),
        None if model["lora"] is None else LoraOptions(**model["lora"]),
        parse_start(model["init_from"]).adapter is not None,
        read_ranks(config["trainer"]),
    )
    height, width = backbone.image_size
    heading = (
        f"{backbone.name} ({type(backbone).__name__}), {height} x {width} pixels, "
        f"{str(backbone.dtype).removeprefix('torch.')}, {len(layout.members)} member(s), {len(layout.sites)} sites, "
        f"on {'the CPU' if on_cpu else 'a device of its own'}"
    )
    return make_plan(backbone, situation), heading


def _sketch_backbone(config: dict[str, Any]) -> Native:
    cls, given = class_of(config), dict(config.get("init_args") or {})
    if not (isinstance(cls, type) and issubclass(cls, Native)):
        raise UserError(
            f"model.backbone is {cls.__name__}, which runs a pipeline's own call: what that takes shows only when it "
            "runs. A plan needs a native backbone."
        )
    pipe = sketch_pipeline(cls.pipelines, given["pretrained"], given["dtype"], given.get("revision"))
    backbone = cls.of(pipe, given.get("height"), given.get("width"))
    backbone.name = str(given["pretrained"])
    backbone.use_memory(MemoryOptions(**given.get("memory") or {}))
    return backbone


def _concurrency(rewards: Mapping[str, Any]) -> int:
    """Units that the rewards can score at the same time: as many as their servers take."""
    most = 1
    for given in rewards.values():
        if isinstance(given, Mapping) and given.get("reward") == "remote":
            options = given["options"]
            urls = options.get("urls", ())
            servers = 1 if isinstance(urls, str) else len(urls)
            most = max(most, servers * int(options.get("per_server", 1)))
    return most


def _count_texts(config: dict[str, Any], guided: bool) -> int:
    """Different texts of a fit; sources of the Hub are left out."""
    data = PromptData(**config)
    prompts = [
        prompt
        for part in ("train", "val", "test")
        if (source := data.sources[part]) is not None and not source.startswith("hf:")
        for prompt in read_prompts(source, data.duplicates)[: data.sizes.get(part)]
    ]
    negatives = {prompt.negative for prompt in prompts} if guided else set()
    return len({prompt.text for prompt in prompts}) + len(negatives)


def to_json(plan: MemoryPlan, heading: str) -> dict[str, Any]:
    """Lays a plan out for JSON; sizes are bytes.

    Args:
        plan: The plan.
        heading: What it is for.

    Returns:
        Plain values.
    """
    return {"run": heading, **asdict(plan), "embeddings": plan.embeddings, "peak": plan.peak}


def render(plan: MemoryPlan, heading: str) -> str:
    """Writes a plan as text.

    Args:
        plan: The plan.
        heading: What it is for.

    Returns:
        Lines.
    """
    texts = f"{plan.num_texts:,} texts of {_size(plan.embedding_bytes)} = {_size(plan.embeddings)}, on the host"
    forward = f"{plan.rows_per_forward} rows ({plan.pictures_per_unit} pictures) of {plan.tokens_per_row:,} tokens"
    activations = f"sampling {_optional(plan.sampling_bytes)}, decoding {_optional(plan.decoding_bytes)}"
    lines = [
        heading,
        "",
        f"{'network':<24}{'parameters':>18}{'memory':>14}",
        *(f"  {size.name:<22}{size.parameters:>18,}{_size(size.bytes):>14}" for size in plan.networks),
        "",
        f"{'embeddings':<24}{texts}",
        f"{'one forward':<24}{forward}",
        f"{'activations':<24}{activations}",
        *(() if plan.shards is None else _render_shards(plan.shards)),
        *(() if plan.training is None else _render_training(plan.training)),
        "",
        "expected peak of the device",
        *(f"  {name:<22}{_size(count):>14}" for name, count in (*plan.phases.items(), ("highest", plan.peak))),
        "",
        *plan.notes,
    ]
    return "\n".join(lines)


def _render_shards(plan: ShardPlan) -> list[str]:
    share = f"{_size(plan.share_bytes)} of the transformer on each of {plan.ranks} ranks"
    return [f"{'shards':<24}{share}, {_size(plan.gathered_bytes)} gathered in a forward"]


def _render_training(plan: TrainingPlan) -> list[str]:
    state = (
        f"weights {_size(plan.parameter_bytes)}, gradients {_size(plan.gradient_bytes)}, "
        f"AdamW {_size(plan.optimizer_bytes)}, copies {_size(plan.copy_bytes)}"
    )
    kept = f"latents {_size(plan.trajectory_bytes)}, forward and backward {_optional(plan.backward_bytes)}"
    return [f"{'training':<24}{plan.parameters:,} parameters: {state}", f"{'':<24}{kept}"]


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _optional(count: int | None) -> str:
    return "unknown" if count is None else _size(count)
