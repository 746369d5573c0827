"""Embeddings on disk are used when they can be trusted; text encoders are where the user wants them."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import TinyRuns

from calibri_lightning.backbones import FLUX1, FLUX2, SD3, QwenImage, Stock
from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.memory import MemoryOptions
from calibri_lightning.backbones.native import Native
from calibri_lightning.calibration import (
    CalibrationFile,
    attach,
    build_layout,
    find_sites,
    fingerprint,
    fold,
    fuse,
    load_calibration,
    unload_calibration,
    write_calibration,
)
from calibri_lightning.errors import UserError
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

TEXTS = ("a red circle", "two green squares below a blue triangle")


def make(folder: Path | None = None, build: Any = None, cls: type[Native] = SD3, **options: Any) -> Native:
    backbone = cls.of((build or (lambda: build_pipeline(TINY)))(), *((16, 24) if cls is not SD3 else ()))
    backbone.use_memory(MemoryOptions(embedding_cache=None if folder is None else str(folder), **options))
    return backbone


def qwen(folder: Path) -> Native:
    return make(folder, lambda: tiny.fresh(tiny.qwen_image), QwenImage)


def encodings(backbone: Native) -> list[str]:
    """Gets each text that the text encoders read from now on."""
    read: list[str] = []
    original = backbone.encode_text
    backbone.encode_text = lambda text: (read.append(text), original(text))[1]  # type: ignore[method-assign]
    return read


def same(one: Conditioning, other: Conditioning) -> bool:
    return one.lengths == other.lengths and all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("family", ["sd3", "qwen"])
def test_a_second_run_encodes_nothing(family: str, tmp_path: Path) -> None:
    build = make if family == "sd3" else qwen
    first, second = build(tmp_path), build(tmp_path)
    expected = first.encode(TEXTS)
    read = encodings(second)
    assert same(second.encode(TEXTS), expected)
    assert read == []
    assert same(second.encode(["another text"]), first.encode(["another text"]))
    assert read == ["another text"]
    assert len(files(tmp_path)) == 3
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files(tmp_path), "no leftovers"


def test_prompts_and_negative_prompts_that_read_alike_share_a_file(tmp_path: Path) -> None:
    backbone = make(tmp_path)
    backbone.encode(["a red circle"])
    backbone.encode(["a red circle"], negative=True)
    assert len(files(tmp_path)) == 1


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign_header(path: Path) -> None:
    save_file(load_file(path), path, {"format": "something else"})


def foreign_text(path: Path) -> None:
    """An honest file of another text under this name."""
    other = next(file for file in path.parent.iterdir() if file != path)
    path.write_bytes(other.read_bytes())


def no_header(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("spoil", [damage_cut, damage_bit, damage_empty, foreign_header, foreign_text, no_header])
def test_a_file_that_cannot_be_trusted_is_made_again(
    spoil: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = make(tmp_path).encode(TEXTS)
    spoil(files(tmp_path)[0])
    backbone = make(tmp_path)
    read = encodings(backbone)
    assert same(backbone.encode(TEXTS), expected)
    assert len(read) == 1
    assert "is not used" in caplog.text
    again = make(tmp_path)
    read = encodings(again)
    assert same(again.encode(TEXTS), expected)
    assert read == [], "the file is whole again"


def change_weights(pipe: Any) -> None:
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.mul_(1.001)


def change_tokenizer(pipe: Any) -> None:
    pipe.tokenizer.model_max_length = 7


@pytest.mark.parametrize("change", [change_weights, change_tokenizer])
def test_another_model_never_meets_these_files(change: Callable[[Any], None], tmp_path: Path) -> None:
    make(tmp_path).encode(TEXTS)

    def build() -> Any:
        pipe = build_pipeline(TINY)
        change(pipe)
        return pipe

    other = make(tmp_path, build)
    read = encodings(other)
    other.encode(TEXTS)
    assert len(read) == 2
    assert len(files(tmp_path)) == 4


def test_another_setting_of_the_pipeline_never_meets_these_files(tmp_path: Path) -> None:
    for distilled in (False, True):
        make(tmp_path, lambda d=distilled: tiny.fresh(tiny.flux2_klein, distilled=d), FLUX2).encode(TEXTS[:1])
    assert len(files(tmp_path)) == 2


def test_a_change_of_the_transformer_keeps_the_files(tmp_path: Path) -> None:
    """Calibrating a fine-tune of the transformer needs no new embeddings."""
    make(tmp_path).encode(TEXTS)
    other = make(tmp_path)
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2)
    read = encodings(other)
    other.encode(TEXTS)
    assert read == []


def test_files_hold_tensors_and_text_alone(tmp_path: Path) -> None:
    make(tmp_path).encode(TEXTS[:1])
    with safe_open(files(tmp_path)[0], framework="pt") as file:
        assert set(file.keys()) == {"prompt", "pooled"}
        assert set(file.metadata()) == {"format", "key", "checksum", "lengths"}
        assert json.loads(file.metadata()["lengths"]) is None


def _encode_many(folder: Path, barrier: Any) -> None:
    backbone = make(folder)
    barrier.wait(timeout=100)
    backbone.encode([f"text {number}" for number in range(8)])


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_encode_many, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    backbone, alone = make(tmp_path), make()
    read = encodings(backbone)
    texts = [f"text {number}" for number in range(8)]
    assert same(backbone.encode(texts), alone.encode(texts))
    assert read == []
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 8


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="embedding_cache .* cannot be written"):
        make(tmp_path / "file").encode(TEXTS)


def test_a_disk_that_fills_up_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = make(tmp_path)
    backbone.encode(TEXTS[:1])

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert len(backbone.encode(["x", "y"])) == 2
    assert caplog.text.count("No space left") == 1
    assert len(files(tmp_path)) == 1


def test_dropped_encoders_are_gone_and_new_texts_are_refused() -> None:
    backbone, whole = make(text_encoders="drop"), make()
    expected = whole.encode(TEXTS)
    backbone.prepare(TEXTS, [""])
    assert backbone.pipeline.text_encoder is None
    assert len(backbone.text_encoders()) == 0
    assert len(backbone.modules()) == len(whole.modules()) - 3
    assert same(backbone.encode(TEXTS), expected)
    assert len(backbone.encode([""], negative=True)) == 1
    backbone.prepare(TEXTS, [""])
    with pytest.raises(UserError, match="'a new text' has no embedding.*drop.*offload"):
        backbone.encode(["a new text"])


@pytest.mark.usefixtures("no_plots")
def test_runs_with_dropped_encoders_and_a_cache_deliver_the_same(runs: TinyRuns, tmp_path: Path) -> None:
    flags = ("--trainer.max_steps=2", "--test_after_fit=true")
    plain = runs.fit("plain", *flags)
    folder = tmp_path / "embeddings"
    for name in ("first", "second"):
        memory = f"--model.backbone.memory={{text_encoders: drop, embedding_cache: {folder}}}"
        path = runs.fit(name, *flags, memory)
        assert (path / "calibration.json").read_bytes() == (plain / "calibration.json").read_bytes()
        assert (path / "summary.json").is_file(), "the test's prompts were encoded, too"
    assert len(files(folder)) == 6 + 3 + 3 + 1


def test_encoders_that_come_and_go_are_not_moved_with_the_model() -> None:
    counts = {}
    for choice in ("offload", "keep", "cpu", "drop"):
        backbone = make(text_encoders=choice)
        counts[choice] = len(backbone.resident_modules())
        assert len(backbone.modules()) == 5
    assert counts == {"offload": 2, "keep": 5, "cpu": 2, "drop": 2}


def test_slicing_decodes_the_same_and_tiling_nearly() -> None:
    latents = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = make().decode(latents)
    torch.testing.assert_close(make(vae_slicing=True).decode(latents), expected, atol=5e-6, rtol=0)
    tiled = make(vae_tiling=True)
    assert tiled.pipeline.vae.use_tiling
    assert torch.equal(tiled.decode(latents), expected), "the picture is no larger than a tile"


def test_channels_last_decodes_the_same() -> None:
    latents = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    backbone = make(vae_channels_last=True)
    weight = backbone.pipeline.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(backbone.decode(latents), make().decode(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("cls", "build", "options", "words"),
    [
        (SD3, None, {"attention_backend": "flush"}, "'flush'; diffusers has .*native"),
        (FLUX1, tiny.flux1, {"attention_backend": "sage"}, "'sage' cannot be used here: .*sageattention"),
        (SD3, None, {"attention_backend": "native"}, "SD3Transformer2DModel calls torch's own"),
        (QwenImage, tiny.qwen_image, {"vae_channels_last": True}, "convolves videos"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    cls: type[Native], build: Any, options: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        make(None, None if build is None else lambda: tiny.fresh(build), cls, **options)


@pytest.fixture
def _native_attention_afterwards() -> Any:
    yield
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    _AttentionBackendRegistry.set_active_backend("native")


@pytest.mark.usefixtures("_native_attention_afterwards")
def test_an_attention_back_end_is_used_from_the_start_of_a_run() -> None:
    backbone = make(None, lambda: tiny.fresh(tiny.flux1), FLUX1, attention_backend="_native_math")
    plain = make(None, lambda: tiny.fresh(tiny.flux1), FLUX1)
    noise, sigma, text = plain.noise([1, 2]), torch.full((2,), 0.5), plain.example().take([0, 0])
    with torch.no_grad():
        expected = plain.velocity(noise, sigma, text)
        backbone.prepare([], [])
        processor = backbone.transformer.transformer_blocks[0].attn.processor
        assert processor._attention_backend == "_native_math"
        torch.testing.assert_close(backbone.velocity(noise, sigma, text), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("_native_attention_afterwards")
def test_an_attention_back_end_of_another_device_is_refused_when_the_run_starts() -> None:
    backbone = make(None, lambda: tiny.fresh(tiny.flux1), FLUX1, attention_backend="_native_cudnn")
    with pytest.raises(UserError, match="'_native_cudnn', which FluxTransformer2DModel cannot use here"):
        backbone.prepare([], [])


def test_stock_refuses_to_part_with_its_encoders(tmp_path: Path) -> None:
    backbone = Stock.of(tiny.fresh(tiny.flux1), 16, 24)
    for options in (MemoryOptions(), MemoryOptions(text_encoders="keep", embedding_cache=str(tmp_path))):
        with pytest.raises(UserError, match="Stock leaves encoding to the pipeline"):
            backbone.use_memory(options)
    backbone.use_memory(MemoryOptions(text_encoders="keep", vae_slicing=True))
    assert backbone.pipeline.vae.use_slicing


@pytest.mark.parametrize("kind", ["bnb-int8", "bnb-nf4", "torchao-int8"])
def test_quantisation_without_its_package_is_refused_before_loading(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibri_lightning.backbones.quantisation.find_spec", lambda name: None)
    monkeypatch.setattr("calibri_lightning.backbones.loading.find_folder", lambda *_: pytest.fail("went on to load"))
    package = "torchao" if kind.startswith("torchao") else "bitsandbytes"
    with pytest.raises(UserError, match=f"{kind}, which needs the package {package}"):
        SD3("shapes", memory=MemoryOptions(quantization=kind))  # type: ignore[arg-type]


class Int8Linear(torch.nn.Module):
    """Stands for a quantised Linear: 8-bit weights with a scale a row, the same call as a Linear."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = scale.detach(), linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantised(backbone: Native) -> None:
    for parent in list(backbone.transformer.transformer_blocks.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Int8Linear(child))


def test_scales_act_on_a_quantised_model_and_cannot_be_folded_into_it() -> None:
    """A row's scales on the quantised model are what multiplying the gates of that model does."""
    backbone = make()
    quantised(backbone)
    sites = find_sites(backbone.transformer)
    attachment = attach(backbone.transformer, sites)
    scales = torch.ones(2, len(sites))
    scales[1] = torch.linspace(0.5, 1.5, len(sites))
    noise, sigma, text = backbone.noise([1, 1]), torch.full((2,), 0.5), backbone.example().take([0, 0])
    with torch.no_grad():
        plain = backbone.velocity(noise, sigma, text)
        with attachment.rows(scales):
            hooked = backbone.velocity(noise, sigma, text)
        assert torch.equal(hooked[0], plain[0])
        assert (hooked[1] - plain[1]).abs().max() > 1e-3
        attachment.detach()
        before = [p.clone() for p in backbone.transformer.parameters()]
        with pytest.raises(UserError, match="quantised or sharded.*keep the hooks"):
            fold(backbone.transformer, sites, scales[1])
        assert all(torch.equal(a, b) for a, b in zip(before, backbone.transformer.parameters(), strict=True))


def test_a_calibration_on_a_quantised_pipeline_cannot_be_fused_and_keeps_its_hooks(tmp_path: Path) -> None:
    plain, backbone = make(), make()
    layout = build_layout(find_sites(plain.transformer), "gate", "single", 1.0, "fixed")
    values = tuple(np.linspace(0.5, 1.5, layout.num_parameters).tolist())
    made = (layout.names, values, "gate", layout.members, "fixed", fingerprint(plain.transformer))
    write_calibration(tmp_path / "calibration.json", CalibrationFile(*made))
    quantised(backbone)
    backbone.transformer.hf_quantizer = object()  # as diffusers marks a quantised model
    pipe = load_calibration(backbone.pipeline, tmp_path / "calibration.json")

    def draw() -> torch.Tensor:
        size = {"height": 16, "width": 16, "generator": torch.Generator().manual_seed(1)}
        return pipe(TEXTS[0], num_inference_steps=2, output_type="latent", **size).images

    before = draw()
    with pytest.raises(UserError, match="quantised or sharded.*keep the hooks"):
        fuse(pipe)
    assert torch.equal(draw(), before)
    assert not torch.equal(unload_calibration(pipe) and draw(), before)


def test_layers_whose_weight_is_a_method_are_refused_as_quantised() -> None:
    """torch's own dynamically quantised Linear has no tensor called weight."""
    backbone = make()
    sites = find_sites(backbone.transformer)

    class Packed(torch.nn.Module):
        def weight(self) -> torch.Tensor:
            return torch.zeros(1)

    backbone.transformer.transformer_blocks[0].norm1.linear = Packed()
    with pytest.raises(UserError, match="quantised or sharded"):
        fold(backbone.transformer, sites, torch.ones(len(sites)))
