"""VQAScore and Soft-TIFA on tiny models of the real classes, loaded through the path that loads the published ones."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_clip
from tiny_vlm import CONTROL, PATCH, Kind, save_vlm, tokenizer
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import Reward, RewardConfig, RewardSet
from calibri_lightning.rewards.base import ModelInfo
from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.vlm_loading import PUBLISHED
from calibri_lightning.rewards.vqa import SoftTifa, VQAScore

KINDS = get_args(Kind)
TEXTS = ("cat", 'a {red} "dog" on a mat', "a", "two dogs")
PROMPTS = tuple(Prompt(text, index) for index, text in enumerate(TEXTS))
IMAGES = torch.rand(len(TEXTS), 3, 60, 90, generator=torch.Generator().manual_seed(0))
MERGED = (2, 3)
"""Rows and columns of the picture in the text: what 60 x 90 pixels become for both kinds."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_vlm(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


class ByHand:
    """One question at a time, without padding; patches, positions and softmax written out."""

    def __init__(self, folder: Path, kind: Kind, merged: tuple[int, int] = MERGED) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.patch, self.merged, self.reader = PATCH[kind], merged, tokenizer()

    def patches(self, image: Tensor) -> Tensor:
        side = 2 * self.patch
        picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        picture = picture.resize((self.merged[1] * side, self.merged[0] * side), Image.Resampling.BICUBIC)
        pixels = (np.asarray(picture) / 255 - [0.5, 0.4, 0.3]) / [0.5, 0.6, 0.7]
        found = []
        for top in range(0, pixels.shape[0], side):
            for left in range(0, pixels.shape[1], side):
                for y in (top, top + self.patch):
                    for x in (left, left + self.patch):
                        one = pixels[y : y + self.patch, x : x + self.patch].transpose(2, 0, 1)
                        found.append(np.stack([one, one], axis=1).ravel())  # a picture is a video of two equal frames
        return torch.tensor(np.array(found)).float()

    def probabilities(self, image: Tensor, question: str, forced: Sequence[int] = ()) -> Tensor:
        rows, columns = self.merged
        before = self.reader.encode("<|im_start|>user\n<|vision_start|>")
        after = self.reader.encode(f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n")
        places = self.reader.encode("<|image_pad|>") * (rows * columns)
        start, end = len(before), len(before) + max(rows, columns)
        positions = [(i, i, i) for i in range(start)]
        positions += [(start, start + y, start + x) for y in range(rows) for x in range(columns)]
        positions += [(i, i, i) for i in range(end, end + len(after) + len(forced))]
        with torch.no_grad():
            answer = self.model(
                input_ids=torch.tensor([[*before, *places, *after, *forced]]),
                position_ids=torch.tensor(positions).T[:, None],
                pixel_values=self.patches(image),
                image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]]),
            )
        powers = answer.logits[0, -1].double().exp()
        return powers / powers.sum()

    def of(self, image: Tensor, question: str, forms: Sequence[str]) -> float:
        total = 0.0
        for form in forms:
            ids, product = self.reader.encode(form), 1.0
            for i, token in enumerate(ids):
                product *= float(self.probabilities(image, question, ids[:i])[token])
            total += product
        return total


def vqascore_question(text: str) -> str:
    return f'Does this figure show "{text}"? Please answer yes or no.'


def test_vqascore_is_that_of_an_independent_computation(folders: dict[str, Path], kind: Kind) -> None:
    by_hand = ByHand(folders[kind], kind)
    scores = VQAScore(str(folders[kind]), dtype="float32", batch_size=3)(IMAGES, PROMPTS)
    shares = VQAScore(str(folders[kind]), dtype="float32", normalised=True)(IMAGES, PROMPTS)
    asked = [(image, vqascore_question(text)) for image, text in zip(IMAGES, TEXTS, strict=True)]
    yes = torch.tensor([by_hand.of(image, question, ("Yes", "yes", " Yes")) for image, question in asked])
    no = torch.tensor([by_hand.of(image, question, ("No", "no")) for image, question in asked])
    assert yes.std() > 1e-3, "the tiny model tells pictures or prompts apart"
    torch.testing.assert_close(scores, yes, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(shares, yes / (yes + no), atol=1e-6, rtol=1e-4)


def test_the_picture_matters(folders: dict[str, Path], kind: Kind) -> None:
    reward = VQAScore(str(folders[kind]), dtype="float32")
    scores = reward(IMAGES, [PROMPTS[0]] * len(IMAGES))
    assert scores.unique().numel() == len(IMAGES)


ATOMS = (
    Prompt("two red cats", 0, {"questions": [{"question": "How many cats?", "answer": "two"}]}),
    Prompt(
        "twelve blue dogs",
        1,
        {"vqa_list": [["How many dogs are in the image?", "twelve"], ["Are the dogs blue?", "Yes"]]},
    ),
    Prompt("a mat", 2, {"questions": '[["What is it?", "red mat"], ["Is it day?", "No"], ["Is it?", "yes"]]'}),
)


def test_soft_tifa_is_that_of_an_independent_computation(folders: dict[str, Path], kind: Kind) -> None:
    by_hand = ByHand(folders[kind], kind)

    def p(image: int, question: str, *forms: str) -> float:
        return by_hand.of(IMAGES[image], f"{question} Answer in one word.", forms)

    yes = ("Yes", "yes", " Yes")
    expected = [
        [p(0, "How many cats?", "two", "Two", "2")],
        # Longer than one token: the product of each token given the ones before.
        [
            p(1, "How many dogs are in the image?", "twelve", "Twelve", "12"),
            p(1, "Are the dogs blue?", *yes),
        ],
        [p(2, "What is it?", "red mat", "Red mat"), p(2, "Is it day?", "No", "no"), p(2, "Is it?", *yes)],
    ]
    geometric = torch.tensor([float(np.prod(values) ** (1 / len(values))) for values in expected])
    arithmetic = torch.tensor([float(np.mean(values)) for values in expected])
    images = IMAGES[:3]
    reward = SoftTifa(str(folders[kind]), dtype="float32", batch_size=2)
    found = reward.measure(images, ATOMS)
    assert list(found) == ["soft_tifa", "soft_tifa_arithmetic"]
    torch.testing.assert_close(found["soft_tifa"], geometric, atol=0, rtol=1e-4)
    torch.testing.assert_close(found["soft_tifa_arithmetic"], arithmetic, atol=0, rtol=1e-4)
    other = SoftTifa(str(folders[kind]), dtype="float32", mean="arithmetic")
    torch.testing.assert_close(other(images, ATOMS), arithmetic, atol=0, rtol=1e-4)
    assert other.extra_names == ("soft_tifa_geometric",)


ORDER = torch.tensor([3, 0, 2, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_default_a_score_does_not_depend_on_the_batch_around_it_at_all(
    folders: dict[str, Path], kind: Kind, dtype: str
) -> None:
    reward = VQAScore(str(folders[kind]), dtype=dtype)
    together = reward(IMAGES, PROMPTS)
    alone = torch.cat([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(PROMPTS))])
    assert torch.equal(alone, together)
    assert torch.equal(reward(IMAGES[ORDER], [PROMPTS[i] for i in ORDER]), together[ORDER])


def test_questions_of_one_forward_change_each_other_by_rounding_only(folders: dict[str, Path], kind: Kind) -> None:
    """Questions of different length, and answers of several tokens beside answers of one."""

    def make(cls: type[VQAScore | SoftTifa], size: int) -> Reward:
        return cls(str(folders[kind]), dtype="float32", batch_size=size)

    alone = make(VQAScore, 1)(IMAGES, PROMPTS)
    torch.testing.assert_close(make(VQAScore, 4)(IMAGES, PROMPTS), alone, atol=0, rtol=2e-5)
    shuffled = make(VQAScore, 3)(IMAGES[ORDER], [PROMPTS[i] for i in ORDER])
    torch.testing.assert_close(shuffled, alone[ORDER], atol=0, rtol=2e-5)
    atoms = [make(SoftTifa, size)(IMAGES[:3], ATOMS) for size in (1, 7)]
    torch.testing.assert_close(atoms[1], atoms[0], atol=0, rtol=2e-5)


def test_fewer_pixels(folders: dict[str, Path], kind: Kind) -> None:
    reward = VQAScore(str(folders[kind]), dtype="float32", max_pixels=(2 * PATCH[kind]) ** 2 * 2)
    expected = ByHand(folders[kind], kind, (1, 1)).of(IMAGES[0], vqascore_question("cat"), ("Yes", "yes", " Yes"))
    assert float(reward(IMAGES[:1], PROMPTS[:1])) == pytest.approx(expected, rel=1e-4)


def test_another_question(folders: dict[str, Path], kind: Kind) -> None:
    reward = VQAScore(str(folders[kind]), dtype="float32", template="{text}? {yes or no}")
    expected = ByHand(folders[kind], kind).of(IMAGES[1], f"{TEXTS[1]}? {{yes or no}}", ("Yes", "yes", " Yes"))
    assert float(reward(IMAGES[1:2], PROMPTS[1:2])) == pytest.approx(expected, rel=1e-4)


def test_bfloat16_is_the_default_and_results_are_float32(folders: dict[str, Path], kind: Kind) -> None:
    scores = VQAScore(str(folders[kind]))(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores, VQAScore(str(folders[kind]), dtype="float32")(IMAGES, PROMPTS), atol=0.05, rtol=0
    )
    assert VQAScore(str(folders[kind]))._model._loaded.model.dtype == torch.bfloat16


def test_torchvision_is_not_asked_for_and_nothing_is_loaded_before_prompts_are_checked(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    loaded = []
    original = transformers.AutoModelForImageTextToText.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForImageTextToText,
        "from_pretrained",
        lambda *args, **more: loaded.append(args) or original(*args, **more),
    )
    reward = VQAScore(str(folders["qwen3_vl"]))
    assert not loaded
    reward.check(PROMPTS)
    reward(IMAGES, PROMPTS)
    assert len(loaded) == 1
    assert type(reward._model._loaded.image_processor).__name__ == "Qwen2VLImageProcessorPil"


def test_prepared_rewards_have_their_model_on_the_device_of_the_pictures(folders: dict[str, Path]) -> None:
    for options, expected in (({}, "meta"), ({"device": "cpu"}, "cpu")):
        made = RewardSet({"vqascore": RewardConfig(1.0, {"pretrained": str(folders["qwen3_vl"]), **options})})
        made.prepare(torch.device("meta"))
        assert next(made.entries[0].reward._model._loaded.model.parameters()).device.type == expected


def test_a_set_of_both_reports_all_names(folders: dict[str, Path]) -> None:
    options = {"pretrained": str(folders["qwen3_vl"]), "dtype": "float32"}
    rewards = RewardSet({"vqascore": RewardConfig(1.0, options), "soft_tifa": RewardConfig(0.5, options)})
    rewards.check(ATOMS)
    scores = rewards.score(IMAGES[:3], ATOMS)
    assert set(scores.each) == {"vqascore", "soft_tifa", "soft_tifa_arithmetic"}
    torch.testing.assert_close(scores.total, scores.each["vqascore"] + 0.5 * scores.each["soft_tifa"])


def test_it_says_what_scores(folders: dict[str, Path]) -> None:
    reward = VQAScore(str(folders["qwen3_vl"]), max_pixels=2048)
    info = ModelInfo(folders["qwen3_vl"].name, "unknown", "qwen-vl pil 1024..2048 pixels")
    assert reward.describe() == info


@pytest.mark.parametrize("token", CONTROL[1:])
def test_control_tokens_in_a_prompt_are_refused(folders: dict[str, Path], token: str) -> None:
    with pytest.raises(UserError, match=r"cannot ask .* is a control token"):
        VQAScore(str(folders["qwen2_5_vl"])).check([Prompt(f"a cat{token}", 0)])


def test_prompts_without_questions_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(UserError, match=r"cannot score the prompt 'cat' \(row 1\): it has no questions"):
        SoftTifa("/no/such/folder").check(PROMPTS)


def test_missing_and_wrong_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights .* '/no/such' is neither an existing folder nor a Hub id"):
        RewardSet({"vqascore": RewardConfig(1.0, {"pretrained": "/no/such"})}).check(PROMPTS)
    with pytest.raises(UserError, match=f"weights .* could not be loaded from '{PUBLISHED}'"):
        VQAScore().check(PROMPTS)
    clip = save_clip(tmp_path / "clip")
    with pytest.raises(UserError, match="weights of the reward 'vqascore' could not be loaded"):
        VQAScore(str(clip)).check(PROMPTS)
    mixed = tmp_path / "mixed"
    shutil.copytree(folders["qwen3_vl"], mixed)
    (mixed / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    with pytest.raises(UserError, match="cannot use .*it asks models of the Qwen-VL kind"):
        VQAScore(str(mixed)).check(PROMPTS)
    base = tmp_path / "base"
    shutil.copytree(folders["qwen3_vl"], base)
    (base / "chat_template.json").unlink()
    with pytest.raises(UserError, match="chat template .* could not be loaded .*tuned for dialogue"):
        VQAScore(str(base)).check(PROMPTS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vqascore", {"dtype": "float16"}, "dtype is 'float16'"),
        ("vqascore", {"batch_size": 0}, "batch_size of the reward 'vqascore' is 0; it must be a number from 1 up"),
        ("vqascore", {"max_pixels": 0}, "max_pixels of the reward 'vqascore' is 0"),
        ("vqascore", {"device": "gpu"}, "device .* is 'gpu' .*cuda:1"),
        ("vqascore", {"template": "Is it good?"}, r"template .* 'Is it good\?'; .* \{text\} in it once"),
        ("vqascore", {"normalised": "yes"}, "normalised .* 'yes'; it must be true or false"),
        ("soft_tifa", {"template": "{text}"}, r"\{question\} in it once"),
        ("soft_tifa", {"mean": "harmonic"}, "mean .* 'harmonic'; it must be geometric or arithmetic"),
        ("soft_tifa", {"batch_size": True}, "batch_size of the reward 'soft_tifa' is True"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_reward(name, options)
