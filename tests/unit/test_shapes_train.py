from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calibri_lightning.shapes.captions import HELD_OUT_OBJECTS, prompts
from calibri_lightning.shapes.pictures import KIND_SHARES, draw_pictures
from calibri_lightning.shapes.pipeline import TINY, build_pipeline
from calibri_lightning.shapes.stage import Stage, TrainConfig, cosine_rate
from calibri_lightning.shapes.train import NUM_NULL_TOKENS, encode_pictures, num_null_tokens, train

RUN = TrainConfig(
    Path(), num_pictures=12, vae_steps=5, steps=5, vae_batch_size=3, batch_size=4, warmup=2, save_every=2, shift=2.0
)


class Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 5
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(replace(RUN, out=tmp_path_factory.mktemp("run")), TINY)


def kill_in(stage: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Stage.run

    def dying(self: Stage, loss: Callable[[torch.Generator, float], torch.Tensor]) -> None:
        def checked(generator: torch.Generator, progress: float) -> torch.Tensor:
            if self.name == stage and self.step == step:
                raise Killed
            return loss(generator, progress)

        run(self, checked)

    monkeypatch.setattr(Stage, "run", dying)


@pytest.mark.parametrize(("stage", "step"), [("autoencoder", 3), ("transformer", 0), ("transformer", 3)])
def test_a_killed_run_ends_in_the_same_weights(
    stage: str, step: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_in(stage, step, patch)
        with pytest.raises(Killed):
            train(replace(RUN, out=tmp_path), TINY)
    assert not (tmp_path / "pipeline").exists()
    assert weights(train(replace(RUN, out=tmp_path), TINY)) == weights(finished)


def test_a_finished_run_gives_the_same_weights_again(finished: Path) -> None:
    before = weights(finished)
    assert weights(train(replace(RUN, out=finished.parent), TINY)) == before


def test_training_leaves_the_global_generators_alone(tmp_path: Path, untouched_rng: None) -> None:
    train(replace(RUN, out=tmp_path, vae_steps=1, steps=1), TINY)


def test_stock_diffusers_loads_the_result(finished: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(finished)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.shift == RUN.shift
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    generator = torch.Generator().manual_seed(0)
    picture = pipe(
        "a red circle", num_inference_steps=2, height=16, width=16, generator=generator, output_type="pt"
    ).images
    assert picture.isfinite().all()


def test_training_moves_both_text_encoders_the_transformer_and_the_autoencoder(finished: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    trained = StableDiffusion3Pipeline.from_pretrained(finished)
    start = build_pipeline(TINY, RUN.seed)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        pairs = zip(getattr(trained, part).parameters(), getattr(start, part).parameters(), strict=True)
        assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-3, part
    assert torch.count_nonzero(trained.text_encoder_3.encoder.final_layer_norm.weight) == 0


def test_latents_are_whitened_by_the_numbers_in_the_config() -> None:
    vae = build_pipeline(TINY).vae
    pictures = draw_pictures(8, TINY.image_size, 0)
    latents = encode_pictures(vae, pictures, "cpu")
    assert latents.mean().item() == pytest.approx(0, abs=1e-5)
    assert latents.std().item() == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        pixels = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2) / 127.5 - 1
        raw = vae.encode(pixels).latent_dist.mode()
    # What the stock pipeline undoes before it decodes: latents / scaling_factor + shift_factor.
    torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, raw, atol=1e-4, rtol=1e-4)


def test_pictures_depend_on_seed_and_index_alone() -> None:
    few, many = draw_pictures(5, 16, 7), draw_pictures(9, 16, 7)
    np.testing.assert_array_equal(few.pixels, many.pixels[:5])
    assert few.captions == many.captions[:5]
    assert draw_pictures(5, 16, 8).captions != few.captions


def test_pictures_show_training_captions_only() -> None:
    captions = draw_pictures(400, 16, 0).captions
    assert set(captions) <= {prompt.text for prompt in prompts("train")}
    assert not any(f"{colour} {shape}" in caption for caption in captions for colour, shape in HELD_OUT_OBJECTS)
    related = sum(any(word in caption for word in ("above", "below", " of ")) for caption in captions)
    assert related / 400 == pytest.approx(KIND_SHARES["relation"], abs=0.1)


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [cosine_rate(step, 110, 10) for step in range(111)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(rates[10:]) < 0)


@pytest.fixture
def line(tmp_path: Path) -> Callable[..., tuple[Stage, list[Any], Callable[[torch.Generator, float], torch.Tensor]]]:
    def build(total: int, **settings: Any) -> tuple[Stage, list[Any], Callable[[torch.Generator, float], torch.Tensor]]:
        layer = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(layer.weight)
        config = replace(RUN, out=tmp_path, **settings)
        seen: list[Any] = []

        def loss(generator: torch.Generator, progress: float) -> torch.Tensor:
            x = torch.randn(16, 2, generator=generator)
            seen.append((layer.weight.detach().clone(), x))
            return (layer(x) - x @ torch.tensor([[1.0], [-2.0]])).square().mean()

        return Stage("line", nn.ModuleList([layer]), config, 0.1, total), seen, loss

    return build


def test_a_stage_loads_the_average_of_its_iterates(line: Callable[..., Any]) -> None:
    stage, seen, loss = line(30, ema=0.8, save_every=1)
    stage.run(loss)
    state = torch.load(stage.path, weights_only=True)
    iterates = [weight for weight, _ in seen] + [state["modules"]["0.weight"]]
    average = iterates[0]
    for step, iterate in enumerate(iterates[1:], 1):
        decay = min(0.8, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * iterate
    torch.testing.assert_close(stage.modules[0].weight.detach(), average)
    assert not torch.equal(stage.modules[0].weight, iterates[-1])


def test_a_stage_learns(line: Callable[..., Any]) -> None:
    stage, _, loss = line(300, ema=0.9, save_every=300)
    stage.run(loss)
    torch.testing.assert_close(stage.modules[0].weight.detach(), torch.tensor([[1.0, -2.0]]), atol=0.05, rtol=0)


def test_the_average_holds_no_graph(line: Callable[..., Any]) -> None:
    # It once chained every step's parameters together: memory grew, and a checkpoint could not be resumed.
    stage, _, loss = line(5)
    stage.run(loss)
    assert not any(tensor.requires_grad for tensor in stage.average)
    assert not any(tensor.requires_grad for tensor in torch.load(stage.path, weights_only=True)["average"])


def test_a_checkpoint_whose_average_wants_gradients_resumes(line: Callable[..., Any]) -> None:
    stage, _, loss = line(4)
    stage.run(loss)
    state = torch.load(stage.path, weights_only=True)
    torch.save({**state, "average": [tensor.requires_grad_() for tensor in state["average"]]}, stage.path)
    resumed, seen, loss = line(6)
    resumed.run(loss)
    assert len(seen) == 2


def test_each_step_draws_its_own_batch(line: Callable[..., Any]) -> None:
    stage, seen, loss = line(20)
    stage.run(loss)
    assert len({x.numpy().tobytes() for _, x in seen}) == 20


def test_progress_goes_to_a_table(line: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    stage, _, loss = line(200)
    stage.run(loss)
    rows = [row.split(",") for row in (stage.config.out / "train.csv").read_text().split()]
    assert [row[:2] for row in rows] == [["line", "100"], ["line", "200"]]
    assert float(rows[1][2]) < float(rows[0][2])
    assert capsys.readouterr().out.count("line step") == 2


def test_a_kill_while_saving_keeps_the_previous_checkpoint(
    line: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, _, loss = line(6)
    save = torch.save

    def dying(state: dict[str, Any], path: Path) -> None:
        if state["step"] == 4:
            path.write_bytes(b"half")
            raise Killed
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying)
        with pytest.raises(Killed):
            stage.run(loss)
    resumed, seen, loss = line(6)
    assert resumed.step == 2
    resumed.run(loss)
    assert len(seen) == 4


def test_null_tokens_grow_from_one_to_all_of_them() -> None:
    counts = [num_null_tokens(step / 100) for step in range(101)]
    assert counts[0] == counts[15] == 1
    assert counts[45] == counts[100] == NUM_NULL_TOKENS
    assert counts[30] == pytest.approx(NUM_NULL_TOKENS**0.5)
    assert all(a <= b for a, b in zip(counts, counts[1:], strict=False))
