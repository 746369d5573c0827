"""What holds for all rewards on a CLIP model, and CLIPScore and CLIP-IQA against independent computations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_clip import PIXELS, TOKENS, by_hand, save_clip
from tiny_open_clip import make_open_clip

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import Reward
from calibri_lightning.rewards.base import measure_checked
from calibri_lightning.rewards.clip_text import TextEmbeddings
from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.pixels import to_pixels
from calibri_lightning.rewards.resizing import crop_centre

NAMES = ("pickscore", "clipscore", "hpsv2", "aesthetic", "clip_iqa")
READERS = ("pickscore", "clipscore", "hpsv2")
TEXTS = ("cat", "red dog", "", "cat", "two dogs", "cat", "blue")
PROMPTS = tuple(Prompt(text, index) for index, text in enumerate(TEXTS))
IMAGES = torch.rand(len(TEXTS), 3, 40, 56, generator=torch.Generator().manual_seed(0))
TOLERANCE = {"pickscore": 2e-5, "clipscore": 2e-6, "hpsv2": 2e-6, "aesthetic": 2e-5, "clip_iqa": 2e-5}
"""Of a score whose picture is scored in another batch."""

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def make(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    from transformers import CLIPTokenizer

    other = tmp_path_factory.mktemp("weights")
    torch.save(make_open_clip(len(CLIPTokenizer.from_pretrained(folder))).state_dict(), other / "hps.pt")
    widths, random = (8, 1024, 128, 64, 16, 1), torch.Generator().manual_seed(1)
    head = {}
    for place, inner, outer in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        head[f"layers.{place}.weight"] = torch.randn(outer, inner, generator=random) / inner**0.5
        head[f"layers.{place}.bias"] = torch.zeros(outer)
    torch.save(head, other / "head.pth")
    places = {name: {"pretrained": str(folder)} for name in NAMES}
    places["clip_iqa"]["pretrained"] = str(save_with_near_texts(folder, tmp_path_factory.mktemp("near")))
    places["hpsv2"] = {"pretrained": str(other / "hps.pt"), "processor": str(folder)}
    places["aesthetic"]["head"] = str(other / "head.pth")
    return lambda name, **options: find_reward(name, {**places[name], **options})


def save_with_near_texts(folder: Path, target: Path) -> Path:
    """The same model, but with texts so near to each other that two of them are about as likely, as for a real one.

    Its temperature is 100, as OpenAI's.
    """
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.text_model.final_layer_norm.bias += torch.linspace(-50, 50, 16)
        model.logit_scale.fill_(math.log(100))
    model.save_pretrained(target)
    CLIPProcessor.from_pretrained(folder).save_pretrained(target)
    return target


def test_clipscore_is_the_cosine(folder: Path, make: Make) -> None:
    by_steps = torch.tensor([by_hand(folder, image, text).cosine for image, text in zip(IMAGES, TEXTS, strict=True)])
    assert by_steps.std() > 0.01
    torch.testing.assert_close(make("clipscore", batch_size=3)(IMAGES, PROMPTS), by_steps, atol=1e-5, rtol=0)


def test_the_two_halves_give_what_one_call_of_the_model_gives(folder: Path, make: Make) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pixels = (IMAGES * 255).round().to(torch.uint8)
    with torch.no_grad():
        inputs = processor(text=list(TEXTS), images=list(pixels), return_tensors="pt", padding=True)
        answer = model(**inputs)
    torch.testing.assert_close(
        make("pickscore")(IMAGES, PROMPTS), answer.logits_per_image.diagonal(), atol=2e-4, rtol=0
    )


def test_clip_iqa_is_that_of_torchmetrics(folder: Path, tmp_path: Path) -> None:
    from torchmetrics.functional.multimodal import clip_image_quality_assessment
    from transformers import CLIPModel, CLIPProcessor

    save_with_near_texts(folder, tmp_path)  # torchmetrics' temperature is 100, whatever the model's
    model, processor = CLIPModel.from_pretrained(tmp_path).eval(), CLIPProcessor.from_pretrained(tmp_path)
    # It wants tensors of what returns structures since transformers 5.
    halves = SimpleNamespace(
        get_text_features=lambda ids, mask: model.get_text_features(ids, mask).pooler_output,
        get_image_features=lambda pixels: model.get_image_features(pixels).pooler_output,
    )
    halves.to = lambda device: halves
    pixels = torch.randint(256, (5, 3, PIXELS, PIXELS), generator=torch.Generator().manual_seed(0))
    for pair in ((), ("Sharp.", "Soft.")):  # torchmetrics does not cut what is too long
        options = dict(zip(("good", "bad"), pair, strict=False))
        with torch.no_grad():
            theirs = clip_image_quality_assessment(
                pixels.float(), model_name_or_path=lambda: (halves, processor), prompts=(pair or "quality",)
            )
        ours = find_reward("clip_iqa", {"pretrained": str(tmp_path), **options})(pixels / 255, PROMPTS[:5])
        assert theirs.std() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_the_batch_around_it(name: str, make: Make) -> None:
    reward: Reward = make(name)
    together = reward(IMAGES, PROMPTS)
    assert together.isfinite().all()
    assert together.std() > 100 * TOLERANCE[name]
    # The same call gives the same bits, whatever was scored in between; another batch gives the same to rounding.
    alone = torch.cat([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(PROMPTS))])
    assert torch.equal(reward(IMAGES, PROMPTS), together)
    assert torch.equal(make(name)(IMAGES, PROMPTS), together)
    assert torch.equal(make(name, batch_size=1)(IMAGES, PROMPTS), alone)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    shuffled = make(name, batch_size=3)(IMAGES[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(alone, together, atol=TOLERANCE[name], rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=TOLERANCE[name], rtol=0)


@pytest.mark.parametrize("name", READERS)
def test_a_prompt_is_embedded_once_and_alone(name: str, make: Make) -> None:
    reward = make(name)
    reward.check(())
    shapes: list[tuple[int, ...]] = []
    reward._scorer.model.text_model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    first = reward(IMAGES, PROMPTS)
    assert shapes == [(1, TOKENS)] * len(set(TEXTS))
    # Other prompts around it, and one more call: the same bits, and no more work.
    others = [PROMPTS[0], *[Prompt("new", 1)] * (len(PROMPTS) - 1)]
    assert reward(IMAGES, others)[0] == first[0]
    assert torch.equal(reward(IMAGES, PROMPTS), first)
    assert len(shapes) == len(set(TEXTS)) + 1


def test_kept_embeddings_are_bounded_and_bound_to_a_device(folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    model, seen = CLIPModel.from_pretrained(folder).eval().requires_grad_(False), []
    model.text_model.register_forward_hook(lambda *_: seen.append(1))
    texts = TextEmbeddings(model, CLIPTokenizer.from_pretrained(folder), max_kept=2)
    first = texts(["a", "b"])
    assert torch.equal(texts(["a", "b"]), first)
    texts(["a", "c"])  # gives up b, the least recently used
    assert len(seen) == 3
    texts(["a"])
    assert len(seen) == 3
    assert torch.equal(texts(["a", "b"]), first)
    assert len(seen) == 4
    # More at once than are kept.
    assert torch.equal(texts(["c", "a", "b", "a"])[1:3], first)
    assert len(texts._kept) == 2
    texts._kept["a"] = first[0].to("meta")  # as if the model had been there
    assert torch.equal(texts(["a", "b"]), first)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_cut_where_the_model_stops_reading_which_is_said_once(
    name: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    reward = make(name)
    long, longer = "a" * (TOKENS - 1), "a" * 30
    prompts = [Prompt(text, index) for index, text in enumerate(("a" * (TOKENS - 2), long, "", longer))]
    with caplog.at_level(logging.WARNING, logger="calibri_lightning"):
        reward.check(prompts)
        reward.check(prompts)
        scores = reward(IMAGES[:1].expand(4, -1, -1, -1), prompts)
    if name not in READERS:
        assert not caplog.records
        torch.testing.assert_close(scores, scores[:1].expand(4), atol=TOLERANCE[name], rtol=0)
        return
    [record] = caplog.records
    expected = f"{name} reads the first {TOKENS} tokens of a prompt: 2 of 4 go on after that, for instance {long!r}"
    assert expected in record.getMessage()
    torch.testing.assert_close(scores[1], scores[3], atol=TOLERANCE[name], rtol=0)
    assert abs(scores[1] - scores[2]) > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 31), (31, 3), (2, 5)])
def test_pictures_of_any_size_are_seen_right(folder: Path, make: Make, size: tuple[int, int]) -> None:
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([by_hand(folder, image, "cat").cosine for image in images])
    torch.testing.assert_close(make("clipscore")(images, [PROMPTS[0]] * 3), expected, atol=1e-5, rtol=0)
    for name in NAMES:
        assert make(name)(images, PROMPTS[:3]).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_scores_are_near(name: str, make: Make) -> None:
    exact = make(name)(IMAGES, PROMPTS)
    scores = measure_checked(make(name, dtype="bfloat16", device="cpu"), IMAGES, PROMPTS)[name]
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, atol=0.05 * max(1.0, float(exact.abs().max())), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_options_and_places_are_refused(name: str, make: Make, tmp_path: Path) -> None:
    assert make(name).pixels == "uint8"
    assert make(name).name == name
    for options, message in (
        ({"dtpye": "bfloat16"}, f"reward '{name}' has no option 'dtpye'.* Did you mean 'dtype'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"batch_size": 0}, f"batch_size of the reward '{name}' is 0; it must be a number from 1 up"),
        ({"device": "gpu"}, f"device of the reward '{name}' is 'gpu'"),
    ):
        with pytest.raises(UserError, match=message):
            make(name, **options)
    with pytest.raises(UserError, match=f"weights of the reward '{name}' cannot be found: '/no/such' is neither"):
        make(name, pretrained="/no/such").check(PROMPTS)
    with pytest.raises(UserError, match=f"weights of the reward '{name}' could not be loaded .*{tmp_path.name}"):
        make(name, pretrained=str(tmp_path)).check(PROMPTS)


def test_clip_iqa_needs_two_opposite_texts(make: Make) -> None:
    for pair in ({"good": "x", "bad": "x"}, {"good": ""}):
        with pytest.raises(UserError, match="must be two texts that say the opposite"):
            make("clip_iqa", **pair)


def test_weights_are_named_by_their_commit(folder: Path, tmp_path: Path, make: Make, monkeypatch: Any) -> None:
    from huggingface_hub import constants

    from calibri_lightning.rewards.loading import commit_of

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--clip" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (tmp_path / "models--owner--clip" / "refs").mkdir()
    (tmp_path / "models--owner--clip" / "refs" / "main").write_text(commit)
    info = make("clipscore", pretrained=str(snapshot)).describe()
    assert (info.revision, info.preprocessing) == (commit, f"pillow-shortest-side-crop-{PIXELS}")
    assert make("clipscore").describe().model == folder.name
    assert make("clipscore").describe().revision == "unknown"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert commit_of("owner/clip") == commit
    assert commit_of("owner/clip", commit, "model.safetensors") == commit
    assert commit_of("owner/clip", "other-branch") == "unknown"
    assert commit_of("owner/other") == "unknown"


@pytest.mark.parametrize(
    "shape", [(40, 56), (56, 40), (28, 28), (29, 200), (500, 37), (1, 1), (3, 90), (90, 1), (13, 13)]
)
def test_torch_resizes_as_pillow_does_to_within_a_level(folder: Path, shape: tuple[int, int]) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    smooth = torch.nn.functional.interpolate(
        torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)), shape, mode="bilinear"
    )
    for images in (smooth, torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))):
        bytes_of = list(to_pixels(images))
        pillow = processor(bytes_of, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        gap = (crop_centre(images, processor) - pillow) * torch.tensor(processor.image_std)[:, None, None] * 255
        # Of very long pictures, Pillow 13 resizes rows first.
        usual = max(shape) < 4 * min(shape)
        assert gap.abs().max() < (1.01 if usual else 20)
        assert (gap.abs() > 0.5).float().mean() < (0.05 if usual else 0.3)


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic", "clip_iqa"])
def test_pictures_can_stay_on_their_device(make: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published, here = make(name), make(name, resize="torch")
    expected = published(IMAGES, PROMPTS)
    assert published.describe().preprocessing == f"pillow-shortest-side-crop-{PIXELS}"
    assert here.describe().preprocessing == f"torch-shortest-side-crop-{PIXELS}"
    monkeypatch.setattr("calibri_lightning.rewards.clip_model.to_pixels", None)
    torch.testing.assert_close(here(IMAGES, PROMPTS), expected, rtol=0.05, atol=0.05)
    with pytest.raises(UserError, match="resize of the reward .* is 'cv2'; it must be pillow or torch"):
        make(name, resize="cv2")


def test_a_crop_that_would_pad_is_refused(folder: Path) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor.crop_size = {"height": 40, "width": 40}
    with pytest.raises(UserError, match="Use resize: pillow"):
        crop_centre(IMAGES, processor)
