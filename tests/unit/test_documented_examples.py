"""The examples that are a model, a strategy and a reward of one's own do what their pages say."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from documents import ROOT, blocks
from run_files import column, last
from sampling_tools import draw
from tiny_runs import TinyRuns

from calibri_lightning.backbones.native import Native
from calibri_lightning.backbones.packing import pack
from calibri_lightning.calibration import attach, find_sites, probe
from calibri_lightning.calibration.sites import BLOCKS
from calibri_lightning.calibration.tables import norm_tuples
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.search import SearchSpace

PROMPTS = ["a red circle", "two green squares below a blue triangle"]
NEGATIVES = ["", "blurry"]
SEEDS = [3, 4]
SIZE = (8, 12)
OVIS = ("OvisImageTransformerBlock", "OvisImageSingleTransformerBlock")


def ovis_image() -> DiffusionPipeline:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tiny.TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    sizes = {"vocab_size": 257, "hidden_size": tiny.TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 256}
    encoder = Qwen3Model(Qwen3Config(**sizes, **heads, initializer_range=0.3, bos_token_id=None, eos_token_id=256))
    return OvisImagePipeline(tiny.scheduler(), tiny.kl_autoencoder(), encoder, tiny.byte_tokenizer(), transformer)


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """The names that docs/adding_a_model.md defines, with the package's own rows taken out before."""
    own = {name: BLOCKS.pop(name) for name in OVIS}
    with pytest.raises(UserError, match="has a block of class OvisImageTransformerBlock"):
        find_sites(tiny.fresh(ovis_image).transformer)
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "adding_a_model.md"):
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
    yield names
    BLOCKS.update(own)


@pytest.fixture
def backbone(page: dict[str, Any]) -> Native:
    made: Native = page["OvisImage"].of(tiny.fresh(ovis_image), *SIZE)
    return made


def stock(pipe: DiffusionPipeline, guidance: float, output_type: str = "latent") -> torch.Tensor:
    height, width = SIZE
    noises = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    negatives = {"negative_prompt": NEGATIVES} if guidance > 1 else {}
    arguments = {"height": height, "width": width, "guidance_scale": guidance, "num_inference_steps": 3, **negatives}
    return pipe(prompt=PROMPTS, generator=noises, output_type=output_type, **arguments).images


def test_the_rows_of_the_page_are_those_of_the_table(page: dict[str, Any], backbone: Native) -> None:
    sites = find_sites(backbone.transformer)
    assert [site.name.partition(".0.")[2] for site in sites] == [
        *("attn.image", "mlp.image", "attn.text", "mlp.text"),
        "fused.joint",
    ]
    ours = {name: BLOCKS[name] for name in OVIS}
    BLOCKS.update(dict(zip(OVIS, (norm_tuples._double, norm_tuples._single), strict=True)))
    assert find_sites(backbone.transformer) == sites
    BLOCKS.update(ours)


def test_the_backbone_of_the_page_draws_as_the_stock_pipeline(backbone: Native) -> None:
    plain = draw(backbone, SEEDS, PROMPTS).latents
    assert (plain - backbone.noise(SEEDS)).abs().max() > 0.05
    torch.testing.assert_close(pack(plain), stock(tiny.fresh(ovis_image), 1.0), rtol=0, atol=2e-6)
    torch.testing.assert_close(backbone.decode(plain), stock(tiny.fresh(ovis_image), 1.0, "pt"), rtol=0, atol=3e-6)
    guided = draw(backbone, SEEDS, PROMPTS, NEGATIVES, [[2.5, -1.5]] * 2).latents
    assert (guided - plain).abs().max() > 1e-3
    torch.testing.assert_close(pack(guided), stock(tiny.fresh(ovis_image), 2.5), rtol=0, atol=5e-6)
    alone = draw(backbone, SEEDS[1:], PROMPTS[1:]).latents
    torch.testing.assert_close(plain[1:], alone, rtol=0, atol=5e-6)


def test_the_backbone_of_the_page_has_no_dead_site(backbone: Native) -> None:
    sites = find_sites(backbone.transformer)
    attachment = attach(backbone.transformer, sites)
    assert not probe(attachment, lambda: backbone.probe_forward(2))


@pytest.fixture
def my_package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The code of docs/adding_a_strategy.md as the module that its configuration names."""
    [text] = [b.text for b in blocks(ROOT / "docs" / "adding_a_strategy.md") if b.language == "python"]
    module = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    exec(compile(text, "my_package.py", "exec"), module.__dict__)
    return module


@pytest.mark.usefixtures("my_package", "no_plots")
def test_the_strategy_of_the_page_fits_and_resumes(runs: TinyRuns) -> None:
    chosen = (
        "--model.strategy=my_package.RandomSearch",
        "--model.strategy.popsize=4",
        "--model.strategy.bucket_size=2",
    )
    whole = runs.fit("whole", *chosen, "--trainer.max_steps=2")
    assert column(whole, "train/images") == [8.0, 16.0]
    assert all(score >= column(whole, "val/start")[0] for score in column(whole, "val/best"))
    cut = runs.fit("cut", *chosen, "--trainer.max_steps=1")
    resumed = runs.fit("cut", *chosen, "--trainer.max_steps=2", f"--ckpt_path={last(cut)}")
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()


def test_the_search_of_the_page_climbs(my_package: types.ModuleType) -> None:
    start = np.ones(5)
    core = my_package.RandomCore(SearchSpace(start, start - 1, start + 1, np.ones(5)), 0, 16, 2, 0.1)
    distances = []
    for generation in range(40):
        candidates = core.ask(generation)
        np.testing.assert_array_equal(core.ask(generation), candidates)
        rewards = -np.square(candidates - 1.4).sum(axis=1, keepdims=True) * np.ones(2)
        assert core.next_cells(np.full((16, 2), np.nan)).all()
        core.tell(rewards)
        distances.append(np.abs(core.mean - 1.4).max())
    assert distances[-1] < 0.1
    core.move(start)
    np.testing.assert_array_equal(core.mean, start)


def test_the_reward_of_the_page_is_red_less_blue() -> None:
    [text] = [b.text for b in blocks(ROOT / "docs" / "rewards.md") if b.language == "python"]
    names: dict[str, Any] = {}
    exec(compile(text, "my_rewards.py", "exec"), names)
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, 0], pictures[1, 2] = 0.75, 0.5
    assert names["warmth"](pictures, []).tolist() == [0.75, -0.5]
