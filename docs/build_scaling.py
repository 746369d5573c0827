"""Computes the tables of docs/scaling.md: python docs/build_scaling.py.

Counts the arithmetic of the released architectures (random, on the meta device), takes populations from the shipped
configurations, and simulates the ranks. A test compares the page with what this script would write.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calibri_lightning.assembly import CalibrationConfig
from calibri_lightning.bench.models import RANDOM_MODELS
from calibri_lightning.bench.prediction import Assumptions, count_picture, predict
from calibri_lightning.bench.random_models import build_random
from calibri_lightning.bench.scaling_options import RANKS
from calibri_lightning.bench.scaling_report import CUTS, EACH, format_bytes
from calibri_lightning.bench.simulation import Cost, Generated, Work, simulate
from calibri_lightning.calibration import build_layout, find_sites
from calibri_lightning.cli import parse_fit
from calibri_lightning.strategies import CMAES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
GPUS = (8, 64, 512)
POPULATIONS = {"published": 17, "large": 130}
"""Candidates of the simulated tables: of the published search on FLUX.1-dev, and of one that many ranks can share."""
BUCKET, UNIT = 16, 64
CPU_COST = Cost()


@dataclass(frozen=True)
class Model:
    """A model of the second table."""

    title: str
    config: str
    recipe: str
    side: int
    """Height and width, pixels: the model's own, which the paper's configurations halve."""


MODELS = (
    Model("SD3.5-M", "sd35_medium/paper.yaml", "sd3.5-medium", 1024),
    Model("FLUX.1-dev", "flux1_dev/paper_layer.yaml", "flux.1-dev", 1024),
    Model("Qwen-Image", "qwen_image/paper.yaml", "qwen-image", 1328),
)


def simulated(popsize: int) -> str:
    """The table of the simulated ranks for one population."""
    work = Work(popsize, BUCKET, UNIT)
    head = (
        "ranks",
        "units",
        "pictures of the busiest",
        "seconds",
        "from rank 0",
        "to rank 0",
        "idle",
        "idle, 24",
        "idle, 1",
    )
    rows = []
    for ranks in RANKS:
        found: dict[str, Generated] = {
            name: simulate(work, CPU_COST, ranks, over or ranks) for name, over in CUTS.items()
        }
        own = found[EACH]
        counts = (f"{ranks:,}", str(own.num_units), str(own.busiest), f"{own.seconds:.4g}")
        travel = (format_bytes(own.sent_bytes), format_bytes(own.received_bytes))
        rows.append((*counts, *travel, *(f"{point.idle_share:.1%}" for point in found.values())))
    return table(head, rows)


def predicted() -> str:
    """The table of predicted generations."""
    assumed, rows = Assumptions(), []
    for model in MODELS:
        words = ["--config", str(ROOT / "configs" / model.config), "--model.backbone.pretrained=x"]
        config = parse_fit(words)["model"]
        given = config["calibration"]
        backbone = build_random(RANDOM_MODELS[model.recipe], "bfloat16", torch.device("meta"), None, model.side)
        calibration = CalibrationConfig(**given)
        guidance = backbone.plain_guidance(calibration.guidance_scale)
        sites = find_sites(backbone.transformer)
        layout = build_layout(sites, calibration.granularity, calibration.members, guidance, calibration.weight_mode)
        strategy = CMAES(**config["strategy"]["init_args"])
        pictures, members = strategy.num_cells(layout.num_parameters), len(layout.members)
        popsize, bucket = pictures // strategy.bucket_size, strategy.bucket_size
        cost = count_picture(backbone, members, config["num_steps"])
        work = Work(popsize, bucket, 1, layout.num_parameters)
        for gpus in GPUS:
            own = predict(cost, work, members, assumed, gpus, gpus)
            rows.append(
                (
                    f"{model.title}, {model.side} px",
                    f"{cost.row_flops / 1e12:.1f} x {cost.num_rows} + {cost.decoding_flops / 1e12:.1f}",
                    f"{cost.seconds(assumed):.2f}",
                    f"{popsize} x {bucket} = {pictures}",
                    *(str(gpus), str(own.busiest), f"{own.idle_share:.1%}", f"{own.seconds:.3g}"),
                    format_bytes(own.sent_bytes + own.received_bytes),
                )
            )
    head = ("model", "TFLOP a picture", "s a picture", "pictures a generation", "GPUs")
    return table((*head, "pictures of the busiest", "idle", "s a generation", "through rank 0"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays a table out in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("--- |", "---|") for line in lines)


def build(page: str) -> str:
    """Puts the computed tables into the page, each between its two marks."""
    made = {name: simulated(popsize) for name, popsize in POPULATIONS.items()} | {"predicted": predicted()}
    for name, text in made.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{marks[0]}.*?{marks[1]}", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"{PAGE} must have {marks[0]} ... {marks[1]} once")
        page = pattern.sub(lambda _, text=text, marks=marks: f"{marks[0]}\n\n{text}\n\n{marks[1]}", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(build(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
