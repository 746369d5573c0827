"""A small comparison with known numbers: a base, three runs, two numbers of steps, two rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from calibri_lightning.evaluation.diversity import Diversity
from calibri_lightning.evaluation.summary import Budget
from calibri_lightning.tools.compare import (
    Comparison,
    Contender,
    Course,
    GalleryPrompt,
    Scales,
    Scored,
    Setting,
    compare,
    encode,
)

NUM_PROMPTS = 40
GAINS = {"base": 0.0, "CMA-ES": 0.10, "Flow-GRPO": 0.15, "stacked": 0.2}
"""What each contender has over the base, on every picture."""
NOISE = np.random.Generator(np.random.Philox(key=3)).normal(0.5, 0.1, NUM_PROMPTS)

SCALES = Scales(
    tuple(f"member{m}/transformer_blocks.{b}.{layer}" for m in (0, 1) for b in range(6) for layer in ("attn", "mlp")),
    tuple(1 + 0.3 * float(np.sin(i)) for i in range(24)),
    ("prompt", "negative"),
)


def contenders() -> tuple[Contender, ...]:
    return (
        Contender("base", num_members=2),
        *(
            Contender(
                name,
                method,
                f"runs/{name}",
                trained,
                2,
                Budget(images, 20 * images, images / 7),
                SCALES if trained < 100 else None,
                Course((0.0, images / 2, float(images)), (0.5, 0.55, 0.5 + GAINS[name])),
            )
            for name, method, trained, images in (
                ("CMA-ES", "CMAES", 24, 20_000),
                ("Flow-GRPO", "FlowGRPO", 120_000, 40_000),
                ("stacked", "CMAES", 24, 60_000),
            )
        ),
    )


def scored(name: str, steps: int) -> Scored:
    reward = NOISE + GAINS[name] + 0.005 * steps
    held_out = NOISE - 0.5 * GAINS[name]  # what is gained in one is lost in the other
    vendi = tuple(5.0 - 8 * GAINS[name] + 0.1 * n for n in range(4))
    return Scored(
        name,
        steps,
        {"shapes": reward, "pickscore": held_out},
        Diversity(vendi, (0.2,) * 4, 8, "shapes") if steps == 8 else None,
    )


def gallery(prompts: Sequence[str]) -> tuple[GalleryPrompt, ...]:
    found = []
    for number, prompt in enumerate(prompts):
        pictures = []
        for index, (name, gain) in enumerate(GAINS.items()):
            y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
            disk = ((x - 0.2 * number + 0.3) ** 2 + y**2 < 0.2 + 0.1 * index).float()
            picture = torch.stack([0.9 - 0.5 * disk, 0.9 - 0.2 * index * disk, 0.9 - 0.8 * disk + 0.1 * x.clamp(0, 1)])
            pictures.append(encode(picture.clamp(0, 1), name, 0.5 + gain))
        found.append(GalleryPrompt(prompt, tuple(pictures)))
    return tuple(found)


def example(prompts: Sequence[str] = ("a red circle", "two blue squares"), title: str = "Shapes") -> Comparison:
    setting = Setting(title, "shapes (SD3)", "python -m calibri_lightning compare", tuple(prompts), 8, "shapes")
    cells = [scored(name, steps) for name in GAINS for steps in (8, 28)]
    return compare(setting, contenders(), cells, gallery(prompts))
