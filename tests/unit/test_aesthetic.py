"""The aesthetic predictor: its layers have no activations, so together they are one straight line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_clip import PIXELS, by_hand, save_clip
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.aesthetic import HEAD_FILE, Aesthetic

WIDTHS = (8, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)
IMAGES = torch.rand(5, 3, 40, 56, generator=torch.Generator().manual_seed(0))
PROMPTS = tuple(Prompt("cat" * i, i) for i in range(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def head() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for place, inner, outer in zip(PLACES, WIDTHS, WIDTHS[1:], strict=False):
        tensors[f"layers.{place}.weight"] = torch.randn(outer, inner, generator=random) / inner**0.5
        tensors[f"layers.{place}.bias"] = torch.randn(outer, generator=random)
    return tensors


def expected(head: dict[str, Tensor], folder: Path) -> Tensor:
    slope, offset = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for place in PLACES:
        weight = head[f"layers.{place}.weight"].double()
        slope, offset = weight @ slope, weight @ offset + head[f"layers.{place}.bias"].double()
    return torch.stack([slope[0] @ by_hand(folder, image, "").seen + offset[0] for image in IMAGES])


def as_pth(head: dict[str, Tensor], folder: Path) -> Aesthetic:
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return Aesthetic(head=str(folder / "sac+logos+ava1-l14-linearMSE.pth"), pretrained=str(folder.parent / "clip"))


def as_safetensors(head: dict[str, Tensor], folder: Path) -> Aesthetic:
    from safetensors.torch import save_file

    save_file(head, folder / HEAD_FILE)
    return Aesthetic(head=str(folder), pretrained=str(folder.parent / "clip"))


def as_whole_model(head: dict[str, Tensor], folder: Path) -> Aesthetic:
    """As the port for transformers holds it: with the vision tower."""
    from safetensors.torch import load_file

    tower = load_file(folder.parent / "clip" / "model.safetensors")
    seeing = {k: v for k, v in tower.items() if k.startswith(("vision_model.", "visual_projection."))}
    assert seeing
    return as_safetensors({**head, **seeing}, folder)


Save = Callable[[dict[str, Tensor], Path], Aesthetic]


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "clip").symlink_to(folder)
    (tmp_path / "head").mkdir()
    return tmp_path / "head"


@pytest.mark.parametrize("save", [as_pth, as_safetensors, as_whole_model])
def test_scores_are_a_straight_line(head: dict[str, Tensor], folder: Path, place: Path, save: Save) -> None:
    scores = save(head, place)(IMAGES, PROMPTS)
    by_line = expected(head, folder)
    assert by_line.std() > 0.05, "the tiny model tells pictures apart"
    torch.testing.assert_close(scores.double(), by_line, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "layers.7.bias",
            None,
            "not the weights of the aesthetic predictor: 1 tensors are absent, layers.7.bias first",
        ),
        ("layers.9.bias", torch.zeros(1), "1 tensors are unknown, layers.9.bias first"),
        (
            "layers.0.weight",
            torch.zeros(1024, 768),
            "fitted on embeddings of width 768, those of the CLIP model have 8",
        ),
        ("layers.2.bias", torch.zeros(3), "Error.* in loading state_dict"),
    ],
)
def test_other_heads_are_refused(
    head: dict[str, Tensor], place: Path, name: str, value: Tensor | None, message: str
) -> None:
    changed = {k: v for k, v in head.items() if k != name} | ({} if value is None else {name: value})
    with pytest.raises(
        UserError, match=f"head of the reward 'aesthetic' could not be loaded .*{message}.*head: FOLDER"
    ):
        as_pth(changed, place).check(())


def test_a_head_that_would_run_code_is_refused(place: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return Path.touch, (place / "touched",)  # type: ignore[return-value]

    with pytest.raises(UserError, match="holds more than tensors, which could run code when it is read"):
        as_pth({"layers.0.weight": Exploit()}, place).check(())  # type: ignore[dict-item]
    assert not (place / "touched").exists()
    torch.load(next(place.glob("*.pth")), weights_only=False)
    assert (place / "touched").exists(), "the file is an exploit where it is trusted"


def test_places_without_a_head(place: Path) -> None:
    with pytest.raises(UserError, match=f"there is no {HEAD_FILE} in this folder"):
        Aesthetic(str(place.parent / "clip"), head=str(place)).check(())
    with pytest.raises(UserError, match="'/no/such' is neither an existing file or folder nor a Hub id"):
        Aesthetic(str(place.parent / "clip"), head="/no/such").check(())


def test_it_has_no_half_that_reads_and_says_what_it_is(head: dict[str, Tensor], place: Path) -> None:
    reward = as_pth(head, place)
    info = reward.describe()
    assert info.model == "clip + sac+logos+ava1-l14-linearMSE.pth"
    assert (info.revision, info.preprocessing) == ("unknown + unknown", f"pillow-shortest-side-crop-{PIXELS}")
    assert not hasattr(reward._scorer.model, "text_model")
    reward.prepare(torch.device("meta"))
    assert {p.device.type for p in (*reward._scorer.model.parameters(), *reward._head.parameters())} == {"meta"}
