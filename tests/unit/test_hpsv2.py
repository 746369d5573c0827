"""HPSv2.1: weights of open_clip in a model of transformers, against an implementation of open_clip's model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import PIXELS, save_clip, token_ids
from tiny_open_clip import OpenClip, make_open_clip
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.hpsv2 import _MEAN, _STD, FILE, HpsV2
from calibri_lightning.rewards.open_clip_keys import load_open_clip
from calibri_lightning.rewards.resizing import fit_longest_side

TEXTS = ("cat", "red dog", "", "two dogs and a cat and more", "blue", "cat")
SIZES = ((40, 56), (56, 40), (28, 28), (28, 20), (1, 1), (1, 90), (90, 1), (10, 1), (200, 3), (3, 7))
RANDOM = torch.Generator().manual_seed(0)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reference(processor: Path) -> OpenClip:
    from transformers import CLIPTokenizer

    return make_open_clip(len(CLIPTokenizer.from_pretrained(processor)))


@pytest.fixture(scope="module")
def weights(reference: OpenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the published file is: the state dict beside other things."""
    path = tmp_path_factory.mktemp("weights") / FILE
    torch.save({"epoch": 3, "name": "x", "state_dict": reference.state_dict()}, path)
    return path


def fitted_by_pillow(image: Tensor, size: int) -> Tensor:
    """Whole picture on black; channels resized as floating-point pictures."""
    pixels = (image * 255).round() / 255
    scale = size / max(image.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
    canvas = torch.zeros(3, size, size, dtype=torch.float64)
    left, top = (size - width) // 2, (size - height) // 2
    for channel, target in zip(pixels, canvas, strict=True):
        resized = Image.fromarray(channel.contiguous().numpy(), mode="F").resize(
            (width, height), Image.Resampling.BICUBIC
        )
        target[top : top + height, left : left + width] = torch.from_numpy(np.asarray(resized).copy())
    return (canvas - MEAN[:, None, None]) / STD[:, None, None]


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_picture_is_fitted_on_black(size: tuple[int, int]) -> None:
    image = torch.rand(3, *size, generator=RANDOM)
    [ours] = fit_longest_side(image[None], PIXELS, _MEAN, _STD)
    torch.testing.assert_close(ours.double(), fitted_by_pillow(image, PIXELS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_scores_are_those_of_open_clip(
    processor: Path, reference: OpenClip, weights: Path, size: tuple[int, int]
) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(processor)
    images = torch.rand(len(TEXTS), 3, *size, generator=RANDOM)
    scores = HpsV2(str(weights), processor=str(processor), batch_size=4)(
        images, [Prompt(t, i) for i, t in enumerate(TEXTS)]
    )
    with torch.no_grad():
        seen = reference.visual(torch.stack([fitted_by_pillow(image, PIXELS).float() for image in images]))
        read = torch.stack([reference.read(token_ids(tokenizer, text)) for text in TEXTS])
    cosines = torch.nn.functional.cosine_similarity(seen.double(), read.double())
    assert cosines.std() > 0.01, "the tiny model tells pictures or prompts apart"
    torch.testing.assert_close(scores.double(), cosines, atol=1e-5, rtol=0)


def test_each_tensor_is_used(reference: OpenClip) -> None:
    """Changing any one of the weights changes an embedding; the temperature is not in the score."""
    pixels = torch.randn(2, 3, PIXELS, PIXELS, generator=RANDOM)
    ids = torch.tensor([[len(reference.token_embedding.weight) - 2, 5, 9, len(reference.token_embedding.weight) - 1]])

    def embed(tensors: dict[str, Tensor]) -> Tensor:
        model = load_open_clip(tensors, torch.float64)
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(pixels.double()).pooler_output)
            return torch.cat([seen, model.text_projection(model.text_model(ids).pooler_output)])

    state = reference.state_dict()
    before = embed(state)
    for name, value in state.items():
        changed = embed({**state, name: value + torch.linspace(0, 1, value.numel()).view_as(value)})
        assert torch.equal(changed, before) == (name == "logit_scale"), name


def test_the_published_sizes_are_found_in_the_weights() -> None:
    with torch.device("meta"):
        state = OpenClip(49408, (1024, 16, 24), (1280, 16, 32), 1024, 77, 224).state_dict()
    model = load_open_clip(state, torch.float32)
    # The figure that open_clip's table of models has for ViT-H-14: 986.11 million.
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers, text.intermediate_size) == (
        1024,
        16,
        24,
        4096,
    )
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (1280, 16, 32)
    assert (vision.intermediate_size, vision.patch_size, vision.image_size) == (5120, 14, 224)
    assert (text.max_position_embeddings, text.vocab_size, model.config.projection_dim) == (77, 49408, 1024)
    assert text.hidden_act == vision.hidden_act == "gelu"


def broken(weights: Path, folder: Path, name: str, value: Tensor | None) -> Path:
    state = torch.load(weights, weights_only=True)["state_dict"]
    state.pop(name) if value is None else state.update({name: value})
    torch.save({"state_dict": state}, folder / FILE)
    return folder


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("visual.proj", None, "not the weights of an open_clip ViT-H-14: 1 tensors are absent, visual.proj first"),
        ("transformer.resblocks.1.mlp.c_fc.bias", None, "absent, transformer.resblocks.1.mlp.c_fc.bias first"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", None, "absent, visual.transformer.resblocks.0.attn.in"),
        ("score_predictor.layers.0.weight", torch.zeros(1), "1 tensors are unknown, score_predictor.layers.0.weight"),
        ("visual.transformer.resblocks.1.ls_1.gamma", torch.zeros(1), "unknown, visual.transformer.resblocks.1.ls_1"),
        ("ln_final.weight", torch.zeros(7), "size mismatch|Error.* in loading state_dict"),
    ],
)
def test_weights_of_another_model_are_refused(
    processor: Path, weights: Path, tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    folder = broken(weights, tmp_path, name, value)
    with pytest.raises(UserError, match=f"weights of the reward 'hpsv2' could not be loaded .*({message})"):
        HpsV2(str(folder), processor=str(processor)).check(())


def test_other_files_are_refused(processor: Path, tmp_path: Path) -> None:
    for content, message in (
        ({"state_dict": [1, 2]}, "does not hold named tensors"),
        (torch.zeros(2), "does not hold named tensors"),
        ({"state_dict": {"a": torch.zeros(1)}, "class": Path}, "holds more than tensors, which could run code"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match=message):
            HpsV2(str(tmp_path / "other.pt"), processor=str(processor)).check(())
    with pytest.raises(UserError, match=f"there is no {FILE} in this folder"):
        HpsV2(str(tmp_path), processor=str(processor)).check(())
    with pytest.raises(UserError, match="neither an existing file or folder nor a Hub id"):
        HpsV2(str(tmp_path / "no.pt"), processor=str(processor)).check(())
    assert HpsV2(str(processor), processor=str(processor), file="model.safetensors")._file == "model.safetensors"


def test_it_says_what_it_is(processor: Path, weights: Path) -> None:
    for place in (weights, weights.parent):
        info = HpsV2(str(place), processor=str(processor)).describe()
        assert info.model in (FILE, f"{weights.parent.name}/{FILE}")
        assert (info.revision, info.preprocessing) == ("unknown", f"torch-longest-side-pad-{PIXELS}")
