"""Runs as a fit leaves them, on tiny pipelines, written without a fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
import yaml
from adapter_tools import disturb
from diffusers import DiffusionPipeline
from rollout_families import CASES
from torch import Tensor

from calibri_lightning import adapters
from calibri_lightning.calibration import (
    CalibrationFile,
    MemberSpec,
    ObtainedBy,
    WeightMode,
    WeightsRecord,
    base_digests,
    build_layout,
    find_sites,
    fingerprint,
    write_calibration,
)
from calibri_lightning.evaluation import write_summary
from calibri_lightning.evaluation.summary import Budget, Condition, summarise
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

Part = Literal["scales", "adapter", "merged", "full"]
SD3_CALL = {"height": TINY.image_size, "width": TINY.image_size, "num_inference_steps": 3}


@dataclass(frozen=True)
class Family:
    """A family of tiny pipelines that are saved, loaded and called as users do it."""

    name: str

    @property
    def backbone(self) -> str:
        return "SD3" if self.name == "sd3" else CASES[self.name].backbone.__name__

    def save(self, folder: Path) -> Path:
        pipe = build_pipeline(TINY) if self.name == "sd3" else CASES[self.name].pipe()
        pipe.save_pretrained(folder)
        return folder

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
        """Plain diffusers; encoders are stored in the type that they load in."""
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: DiffusionPipeline) -> Tensor:
        if self.name != "sd3":
            return CASES[self.name].call(pipe, "pt").float()
        generator = torch.Generator().manual_seed(3)
        call = {**SD3_CALL, "guidance_scale": 1.0, "generator": generator, "output_type": "pt"}
        return pipe(["a red circle", "q"], **call).images.float()


def write_run(
    folder: Path,
    base: Path,
    backbone: str = "SD3",
    parts: Sequence[Part] = ("scales",),
    members: MemberSpec = "single",
    weight_mode: WeightMode = "fixed",
    dtype: str = "float32",
    spread: float = 0.3,
    **settings: Any,
) -> Path:
    """Writes config.yaml, calibration.json, and the weights that a run with these parts leaves."""
    folder.mkdir(parents=True)
    config_file = json.loads((base / "model_index.json").read_text())
    network: Any = getattr(diffusers, config_file["transformer"][1])
    transformer = network.from_pretrained(base / "transformer", dtype=getattr(torch, dtype))
    transformer.requires_grad_(False)
    layout = build_layout(find_sites(transformer), "gate", members, 3.0, weight_mode)
    model = fingerprint(transformer, str(base))
    adapter, weights = _write_weights(folder, transformer, parts)
    theta = layout.start + spread * np.random.default_rng(5).standard_normal(layout.num_parameters)
    file = CalibrationFile(
        layout.names,
        tuple((theta if "scales" in parts else layout.start).tolist()),
        layout.granularity,
        layout.members,
        layout.weight_mode,
        model,
        ObtainedBy("PairES", "redness", 3, 24, 0, 0.25, 0.5, "0.1.0"),
        adapter=adapter,
        weights=weights,
    )
    write_calibration(folder / "calibration.json", file)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(base, backbone, dtype, **settings)))
    return folder


def config(
    base: Path,
    backbone: str,
    dtype: str,
    quantization: str | None = None,
    pretrained: str | None = None,
    test: str = "",
    embedded_guidance: float | None = None,
    name: str = "tiny",
) -> dict[str, Any]:
    """What matters of a run's config.yaml."""
    init = {"pretrained": pretrained or str(base), "dtype": dtype, "memory": {"quantization": quantization}}
    init["embedded_guidance"] = embedded_guidance
    return {
        "name": name,
        "model": {
            "backbone": {"class_path": f"calibri_lightning.{backbone}", "init_args": init},
            "strategy": {"class_path": "calibri_lightning.PairES", "init_args": {"num_pairs": 2}},
            "rewards": {"redness": 1.0, "remote": {"weight": 0.5, "options": {"urls": "http://secret.example"}}},
            "num_steps": 3,
        },
        "data": {"train": "/home/somebody/train.txt", "test": test or "shapes:test"},
    }


def _write_weights(
    folder: Path, transformer: Any, parts: Sequence[Part]
) -> tuple[adapters.AdapterRecord | None, WeightsRecord | None]:
    """As a run's report writes them."""
    record, weights = None, None
    if "full" in parts:
        generator = torch.Generator().manual_seed(1)
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data.add_(0.05 * parameter.std().nan_to_num(0.0) * noise)
        adapters.write_transformer(folder / "transformer", transformer)
        weights = WeightsRecord(base_digests(transformer), "transformer")
    if "merged" in parts:
        first = folder.parent / f"{folder.name}-first"
        digest = _adapter(first / "adapter", transformer, 4)
        adapters.load_adapter(transformer, first, merge=True)
        record = adapters.AdapterRecord(str(first), digest, merged=True)
        weights = WeightsRecord(base_digests(transformer), "", str(first))
    if "adapter" in parts:
        record = adapters.AdapterRecord("adapter", _adapter(folder / "adapter", transformer, 3))
    return record, weights


def _adapter(folder: Path, transformer: Any, seed: int) -> str:
    adapters.add_lora(transformer, adapters.LoraOptions(rank=2), seed=0)
    disturb(transformer, seed)
    digest = adapters.write_adapter(folder, transformer, base_model="/home/somebody/model")
    adapters.remove_lora(transformer)
    return digest


def write_test(folder: Path, sha256: str = "") -> None:
    """Writes the summary.json of a test of 4 prompts."""
    rewards = {"base @ 3 steps": [0.1, 0.2, 0.3, 0.4], "calibrated @ 3 steps": [0.3, 0.4, 0.55, 0.6]}
    conditions = [
        Condition(name, "base" if name.startswith("base") else "calibrated", 3, 3, {"redness": np.array(values)})
        for name, values in rewards.items()
    ]
    budget = Budget(48, 144, 12.5)
    summary = summarise(conditions, "redness", budget, "calibration.json", calibration_sha256=sha256)
    write_summary(folder / "summary.json", summary)
