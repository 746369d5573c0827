"""The configurations that are shipped, and the tiny models that stand in for theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from tiny_runs import TEST, TRAIN, VAL

from calibri_lightning.cli import parse_fit
from calibri_lightning.shapes.pipeline import TINY, build_pipeline
from calibri_lightning.strategies import CMAES, PairES

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [file for file in FILES if file.parent.name == "rewards"]
"""Configurations that go on top of another one."""
WHOLE = [file for file in FILES if file not in OVERLAYS]
UNDERNEATH = ROOT / "configs" / "flux1_dev" / "paper_layer.yaml"
"""What overlays are tried on."""


@dataclass(frozen=True)
class Family:
    """What the configurations of a folder are of."""

    tiny: Callable[[], DiffusionPipeline]
    """The same class, tiny."""
    side: int
    """Of the tiny model's pictures, pixels."""
    recipe: str | None = None
    """The full-size architecture, a name in RANDOM_MODELS."""
    pretrained: str = "shapes"


def tiny_sd3() -> DiffusionPipeline:
    return build_pipeline(TINY)


def lively(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """With a transformer in which every site counts, even rounded to bfloat16; diffusers starts many near 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in pipe.transformer.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return pipe


FAMILIES = {
    "configs": Family(tiny_sd3, 16),
    "shapes": Family(tiny_sd3, 16),
    "sd35_medium": Family(tiny_sd3, 16, "sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium"),
    "sd35_large": Family(tiny_sd3, 16, "sd3.5-large", "stabilityai/stable-diffusion-3.5-large"),
    "flux1_dev": Family(lambda: tiny.fresh(tiny.flux1), 16, "flux.1-dev", "black-forest-labs/FLUX.1-dev"),
    "qwen_image": Family(lambda: tiny.fresh(tiny.qwen_image), 16, "qwen-image", "Qwen/Qwen-Image"),
    "flux2_dev": Family(lambda: tiny.fresh(tiny.flux2_dev), 16, "flux.2-dev", "black-forest-labs/FLUX.2-dev"),
    "flux2_klein": Family(
        lambda: tiny.fresh(tiny.flux2_klein), 16, "flux.2-klein-4b", "black-forest-labs/FLUX.2-klein-base-4B"
    ),
    "z_image": Family(lambda: tiny.fresh(tiny.z_image), 16, "z-image", "Tongyi-MAI/Z-Image"),
}
"""By folder."""

DEAD = {"qwen_image": 2}
"""Sites of full-size models that reach no output, found by the probe of a run: the text branches of the last block."""

NUM_PARAMETERS = {
    # The paper's counts of scales (FLUX 57, 76, 114; SD3.5-M and Qwen-Image 216 and 482 with both members' weights).
    "flux1_dev/paper_block.yaml": 57 + 1,
    "flux1_dev/paper_layer.yaml": 76 + 1,
    "flux1_dev/paper_gate.yaml": 114 + 1,
    "sd35_medium/paper.yaml": 2 * 107 + 2,
    "qwen_image/paper.yaml": 2 * 240 + 2,
    # Ours, and models that the paper does not report.
    "flux1_dev/pair_es.yaml": 76 + 1,
    "flux1_dev/cma_es.yaml": 76 + 1,
    "sd35_medium/pair_es.yaml": 2 * 61 + 2,
    "sd35_medium/cma_es.yaml": 2 * 61 + 2,
    "sd35_large/paper.yaml": 2 * 150 + 2,
    "sd35_large/pair_es.yaml": 2 * 76 + 2,
    "qwen_image/pair_es.yaml": 2 * 120 + 2,
    "flux2_dev/paper.yaml": 80 + 1,
    "flux2_dev/pair_es.yaml": 64 + 1,
    "flux2_klein/paper.yaml": 2 * 40 + 2,
    "flux2_klein/pair_es.yaml": 2 * 30 + 2,
    "z_image/paper.yaml": 2 * 68 + 2,
    "z_image/pair_es.yaml": 2 * 68 + 2,
    # Stacked on a LoRA, the paper's count again.
    "sd35_medium/calibri_on_flow_grpo.yaml": 2 * 107 + 2,
    # LoRAs: (inputs + outputs) x rank of each layer. SD3.5-M: 24 blocks of 8 layers less the last one's text output.
    "sd35_medium/flow_grpo.yaml": 191 * 2 * 1536 * 32,
    "sd35_medium/flow_grpo_fast.yaml": 191 * 2 * 1536 * 32,
    "sd35_medium/diffusion_nft.yaml": 191 * 2 * 1536 * 32,
    # FLUX.1: attention of 19 double (8 layers) and 38 single blocks (3), and two feed-forwards of the double ones.
    "flux1_dev/flow_grpo.yaml": ((19 * 8 + 38 * 3) * 2 + 19 * 4 * 5) * 3072 * 64,
    "flux1_dev/flow_grpo_fast.yaml": ((19 * 8 + 38 * 3) * 2 + 19 * 4 * 5) * 3072 * 64,
    # Qwen-Image: 60 blocks of 8 attention layers and two MLPs.
    "qwen_image/flow_grpo.yaml": 60 * (8 * 2 + 4 * 5) * 3072 * 64,
    "qwen_image/flow_grpo_fast.yaml": 60 * (8 * 2 + 4 * 5) * 3072 * 64,
}


def label(file: Path) -> str:
    return str(file.relative_to(ROOT / "configs"))


def stacked(file: Path) -> list[Path]:
    return [UNDERNEATH, file] if file in OVERLAYS else [file]


@functools.cache
def parsed(file: Path) -> dict[str, Any]:
    return parse_fit([f"--config={path}" for path in stacked(file)])


def has_gradients(file: Path) -> bool:
    """Whether its strategy is one with gradients."""
    return bool(parsed(file)["model"]["strategy"]["class_path"].endswith((".FlowGRPO", ".DiffusionNFT")))


def takes_turns(file: Path) -> bool:
    """Whether it runs several strategies in turn."""
    return bool(parsed(file)["model"]["strategy"]["class_path"].endswith(".Alternate"))


def strategy_of(file: Path) -> CMAES | PairES:
    """The strategy as configured, one without gradients."""
    strategy = parsed(file)["model"]["strategy"]
    return {"CMAES": CMAES, "PairES": PairES}[strategy["class_path"].rpartition(".")[2]](**strategy["init_args"])


def images_per_step(file: Path, num_parameters: int) -> int:
    """Training images of a step, or generation."""
    if not has_gradients(file):
        return strategy_of(file).num_cells(num_parameters)
    given = parsed(file)["model"]["strategy"]["init_args"]
    return int(given["num_groups"] * given["group_size"])


def training_steps(file: Path) -> int:
    """Sampling steps in training of a strategy with gradients."""
    model = parsed(file)["model"]
    return int(model["strategy"]["init_args"]["num_steps"] or model["num_steps"])


def forwards_per_picture(file: Path) -> int:
    """What a picture costs on paper: 1 a forward, 2 a forward with its backward, 1 the reference's, for each member."""
    model = parsed(file)["model"]
    given, steps = model["strategy"]["init_args"], training_steps(file)
    members = 2 if model["calibration"]["members"] == "cfg" else 1
    if "num_timesteps" in given:
        levels = given["num_timesteps"] or steps
        return int(members * (steps + levels * (3 + (given["loss"]["kl_weight"] > 0))))
    window = given["window"]
    trained = steps - 1 if window is None or window["class_path"].endswith(".AllSteps") else window["init_args"]["size"]
    reference = 0 if given["loss"]["kl"] == "none" else 1
    return int(members * (steps + trained * (2 + reference)))


def write_prompts(folder: Path) -> None:
    """Puts prompts where the configurations expect them, when run in that folder."""
    (folder / "prompts").mkdir()
    for name, texts in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        (folder / "prompts" / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))


def small(file: Path, model: Path, *more: str) -> list[str]:
    """Arguments of one step: other weights, sizes, rewards, prompts and numbers of steps; all else is the file's."""
    side = FAMILIES[(UNDERNEATH if file in OVERLAYS else file).parent.name].side
    return [
        "fit",
        *(f"--config={path}" for path in stacked(file)),
        f"--model.backbone.pretrained={model}",
        f"--model.backbone.height={side}",
        f"--model.backbone.width={side}",
        f"--model.num_steps={5 if takes_turns(file) else 1}",
        "--model.full_num_steps=1",
        "--model.num_grid_prompts=1",
        "--model.num_diversity_prompts=1",
        *(f"--data.{part}=prompts/{part}.txt" for part in ("train", "val", "test")),
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
        *(shrunk(file) if has_gradients(file) else ()),
        *((TURNS,) if takes_turns(file) else ()),
        *more,
    ]


TURNS = (
    '--model.strategy.phases=[{"strategy": {"class_path": "FlowGRPO", "init_args": {"num_groups": 2, "group_size": 2}},'
    ' "steps": 1}, {"strategy": {"class_path": "CMAES", "init_args": {"popsize": 4, "bucket_size": 2}}, "steps": 1}]'
)
"""A turn of each kind, shrunk."""
SHRUNK_IMAGES = 4
"""Training images of a step of a strategy with gradients, once it is shrunk."""


def shrunk(file: Path) -> list[str]:
    """Two groups of two pictures; kernel, window, loss and steps are the file's."""
    sizes = {"num_groups": 2, "group_size": 2, "pictures_per_unit": 2, "num_steps": training_steps(file)}
    return [f"--model.strategy.{name}={value}" for name, value in sizes.items()]
