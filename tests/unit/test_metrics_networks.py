"""FID and KID of networks of one's own, against their closed forms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from metric_tools import RedReward, centre, flat
from PIL import Image
from torch import Tensor, nn

from calibri_lightning.errors import UserError
from calibri_lightning.metrics import FeatureNetwork, KernelDistance, frechet_distance
from calibri_lightning.prompts import Prompt
from calibri_lightning.shapes.captions import prompts as shapes_prompts

MEANS = torch.tensor([[0.4, 0.5, 0.6], [0.45, 0.5, 0.55]], dtype=torch.float64)
FACTORS = torch.tensor(
    [
        [[0.04, 0.0, 0.0], [0.01, 0.03, 0.0], [0.0, 0.02, 0.05]],
        [[0.05, 0.0, 0.0], [-0.02, 0.04, 0.0], [0.01, 0.0, 0.02]],
    ],
    dtype=torch.float64,
)


def points(which: int, count: int = 200) -> Tensor:
    """Points whose sample mean and covariance are exactly those of a Gaussian."""
    raw = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(which))
    raw = raw - raw.mean(dim=0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    return MEANS[which] + white @ FACTORS[which].T


def test_fid_of_two_gaussians_in_closed_form() -> None:
    """Dowson and Landau, 1982: |m - n|^2 + tr(S + T - 2 (S T)^(1/2)), the root by scipy."""
    metric = frechet_distance(FeatureNetwork(centre, side=4))
    for which in (0, 1):
        for part in points(which).split(64):
            metric.update(flat(part, 4), real=which == 0)
    first, second = (factor.numpy() @ factor.numpy().T for factor in FACTORS)
    root = scipy.linalg.sqrtm(first @ second)
    gap = float((MEANS[0] - MEANS[1]).square().sum())
    expected = gap + np.trace(first + second - 2 * root.real)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-4)


def mmd(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased squared MMD of the kernel (x.y / d + 1)^3, summed pair by pair (Gretton et al., 2012, eq. 3)."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(first), len(second)
    within = sum(kernel(first[i], first[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(second[i], second[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(x, y) for x in first for y in second) / (n * m)


def test_kid_is_the_unbiased_mmd() -> None:
    first, second = points(0, 12), points(1, 12) * torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64)
    metric = KernelDistance(FeatureNetwork(centre, side=4), subsets=1, subset_size=12)
    metric.update(flat(first, 4), real=True)
    metric.update(flat(second, 4), real=False)
    mean, spread = metric.compute()
    assert float(mean) == pytest.approx(mmd(first.numpy(), second.numpy()), rel=1e-4)
    assert spread == 0


def test_kid_draws_the_same_subsets_again_and_leaves_the_global_generator_alone() -> None:
    metric = KernelDistance(FeatureNetwork(centre, side=4), subsets=5, subset_size=6)
    for which in (0, 1):
        metric.update(flat(points(which, 20), 4), real=which == 0)
    state = torch.random.get_rng_state()
    first = metric.compute()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    metric._computed = None
    assert metric.compute() == first
    assert first[1] > 0


class Asks(nn.Module):
    """Says what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(0.5)
        self.seen: list[tuple[torch.dtype, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((images.dtype, len(images)))
        return self.dropout(images.float().mean(dim=(2, 3)) * self.weight)


def test_a_network_gets_what_it_takes() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw = FeatureNetwork(Asks(), takes="uint8", side=8, batch_size=2)
    assert raw.num_features == 3
    torch.testing.assert_close(raw(images), images.float().mean(dim=(2, 3)))
    torch.testing.assert_close(raw(images.float() / 255), raw(images))
    assert raw._describe.seen == [(torch.uint8, 1)] + [(torch.uint8, 2), (torch.uint8, 2), (torch.uint8, 1)] * 3

    mean, std = (0.5, 0.25, 0.125), (0.5, 1.0, 2.0)
    normalised = FeatureNetwork(Asks(), num_features=3, mean=mean, std=std)
    expected = (images.float().mean(dim=(2, 3)) / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(normalised(images), expected)
    assert normalised._describe.seen == [(torch.float32, 5)], "nothing is tried out where num_features is given"


def test_it_stays_in_evaluation_and_keeps_no_gradients() -> None:
    metric = frechet_distance(FeatureNetwork(Asks(), side=8))
    metric.train()
    network = metric.inception
    assert not network.training
    assert not network._describe.dropout.training
    assert not network(torch.rand(2, 3, 8, 8)).requires_grad
    assert [name for name, _ in metric.named_parameters()] == ["inception._describe.weight"], "it moves with the metric"


@pytest.mark.parametrize(
    ("describe", "words"),
    [
        (lambda images: images, r"\[1, 3, 8, 8\]"),
        (lambda images: images.mean(dim=(1, 2, 3)), r"\[1\]"),
        (lambda images: images.mean(dim=(2, 3)) / 0, "1 of 1 pictures"),
    ],
)
def test_wrong_networks_are_refused_when_they_are_wrapped(describe: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FeatureNetwork(describe, side=8)  # type: ignore[arg-type]


def test_wrong_settings_and_broken_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size"):
        FeatureNetwork(centre, 3, batch_size=0)
    with pytest.raises(UserError, match="uint8"):
        FeatureNetwork(centre, 3, takes="uint8", mean=(0.5, 0.5, 0.5))
    broken = torch.rand(3, 3, 4, 4)
    broken[1] = torch.nan
    with pytest.raises(UserError, match="1 of 3 pictures"):
        FeatureNetwork(centre, 3)(broken)


class TwoColours(RedReward):
    """Describes a picture by red and green, and by the length of its prompt."""

    def features(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        lengths = torch.tensor([[len(prompt.text)] for prompt in prompts])
        return torch.cat([centre(images)[:, :2], lengths], dim=1)


def test_features_of_a_reward_for_one_prompt() -> None:
    network = FeatureNetwork.from_reward(TwoColours(), "four")
    assert network.num_features == 3
    expected = torch.cat([MEANS[:, :2], torch.full((2, 1), 4.0)], dim=1).float()
    torch.testing.assert_close(network(flat(MEANS)), expected)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(twin(flat(MEANS)), expected)
    with pytest.raises(UserError, match="has no features"):
        FeatureNetwork.from_reward("jpeg_compressibility", "x")


def test_features_of_shapes_need_its_caption() -> None:
    caption = shapes_prompts("val")[0]
    network = FeatureNetwork.from_reward("shapes", caption)
    assert network(torch.full((2, 3, 64, 64), 0.5)).shape == (2, network.num_features)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained ViT, saved with its preprocessing, as DINO is published."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooled"])
def test_a_vision_model_by_folder_has_its_own_preprocessing(vision: Path, pooling: str) -> None:
    from transformers import ViTModel

    network = FeatureNetwork.from_pretrained(str(vision), pooling=pooling)  # type: ignore[arg-type]
    assert network.num_features == 16
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    small = [np.array(picture.resize((16, 16), Image.Resampling.BILINEAR)) for picture in pictures]
    pixels = (torch.tensor(np.stack(small)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        answer = ViTModel.from_pretrained(vision).eval()(pixel_values=pixels)
    tokens = answer.last_hidden_state
    expected = {"cls": tokens[:, 0], "mean": tokens.mean(dim=1), "pooled": answer.pooler_output}[pooling]
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_a_pooler_that_the_weights_lack_is_refused_where_it_is_asked_for(vision: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in vision.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "pooler" not in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert FeatureNetwork.from_pretrained(str(tmp_path)).num_features == 16
    with pytest.raises(UserError, match="pooler"):
        FeatureNetwork.from_pretrained(str(tmp_path), pooling="pooled")
    with pytest.raises(UserError, match="could not be loaded"):
        FeatureNetwork.from_pretrained(str(tmp_path / "absent"))


def test_a_clip_model_is_taken_by_its_eye(tmp_path: Path) -> None:
    from tiny_clip import save_clip

    network = FeatureNetwork.from_pretrained(str(save_clip(tmp_path)), pooling="pooled")
    assert network.num_features == 16
    assert network(torch.rand(2, 3, 20, 20)).shape == (2, 16)
