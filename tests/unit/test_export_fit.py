"""What `fit` itself wrote, exported: from the command line to the stock pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_runs import TinyRuns

from calibri_lightning.__main__ import main
from calibri_lightning.calibration import load_calibration
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.shapes.pipeline import TINY

PROMPT = "a red circle"
SINGLE = ("--model.calibration.members=single", "--model.calibration.weight_mode=raw", "--model.strategy.sigma0=0.5")
LORA = (
    "--model.calibration.members=single",
    "--model.calibration.weight_mode=fixed",
    "--model.strategy=FlowGRPO",
    "--model.strategy.num_groups=1",
    "--model.strategy.group_size=4",
    "--model.strategy.optimizer.lr=0.1",
    "--model.num_steps=3",
)
PAIR = ("--model.strategy.sigma0=0.5",)


def pixels(pipe: DiffusionPipeline, num_steps: int, guidance: float) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(noise_seed(0, -3, 0, 0))
    size = {"height": TINY.image_size, "width": TINY.image_size}
    options = {"num_inference_steps": num_steps, "guidance_scale": guidance, "generator": generator, **size}
    return np.asarray(pipe(PROMPT, **options, output_type="np").images[0], dtype=np.float64) * 255


@pytest.mark.parametrize(
    ("flags", "form", "num_steps"),
    [(SINGLE, "folder", 2), (LORA, "folder", 3), (PAIR, "calibration", 2)],
    ids=["scales", "lora", "pair"],
)
def test_a_fit_is_exported_and_the_stock_call_draws_what_predict_draws(
    runs: TinyRuns, tmp_path: Path, no_plots: None, flags: tuple[str, ...], form: str, num_steps: int
) -> None:
    run = runs.fit("a", *flags, "--data.val=null", "--trainer.max_steps=1", "--model.backbone.dtype=float32")
    out, base = tmp_path / "out", runs.config.parent / "model"
    assert main(["export", str(run), "--out", str(out)]) == 0
    predicted = ["--model.backbone.dtype=float32", f"--model.init_from={run}", f"--data.predict_prompts=[{PROMPT}]"]
    assert runs("predict", "b", *flags, *predicted) == 0
    [file] = (runs.latest("b") / "images").iterdir()
    expected = np.asarray(Image.open(file), dtype=np.float64)

    # A folded folder is asked for without guidance; a pair brings its own, so that any that is on will do.
    guidance = 1.0 if form == "folder" else 2.0
    plain = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    unchanged = pixels(plain, num_steps, guidance)
    made = (
        DiffusionPipeline.from_pretrained(out, dtype=torch.float32)
        if form == "folder"
        else load_calibration(plain, out)
    )
    found = pixels(made, num_steps, guidance)
    assert np.abs(found - expected).max() <= 0.51, "as near as a PNG can be"
    assert np.abs(unchanged - expected).max() > 2, "the fit changed something"
    # Nothing of this package is at work in a folded folder.
    hooks = [m for m in made.transformer.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert bool(hooks) is (form == "calibration")
    assert {path.suffix for path in out.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md", ".txt"}
