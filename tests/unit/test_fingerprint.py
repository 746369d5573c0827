"""A calibration of one size of a model is refused on another size, in every family, quantised or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from site_models import CASES as SITE_MODELS
from tiny_families import CASES
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from calibri_lightning.calibration import check_model, fingerprint
from calibri_lightning.calibration.document import CalibrationFile
from calibri_lightning.calibration.fingerprint import weights_digest
from calibri_lightning.calibration.fold import fold
from calibri_lightning.calibration.scales import Member
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.errors import UserError

MODELS: Mapping[str, Any] = {
    **{f"native-{name}": case.pipe().transformer for name, case in CASES.items()},
    **{case.name: case.tiny().transformer for case in SITE_MODELS},
}


def changed(model: ModelMixin, **changes: Any) -> ModelMixin:
    """A model of the same class and another configuration, without numbers."""
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    with torch.device("meta"):
        return type(model)(**config | changes)


def others(model: ModelMixin) -> Iterator[tuple[str, ModelMixin]]:
    """The same class with one number of its configuration doubled, where the class takes that."""
    for key, value in dict(model.config).items():
        if key.startswith("_") or isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 512:
            continue
        try:
            yield key, changed(model, **{key: 2 * value})
        except Exception:  # numbers that depend on each other, refused in many ways
            continue


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def file_of(model: nn.Module) -> CalibrationFile:
    return CalibrationFile(("a",), (1.0,), "gate", (Member("prompt", 1.0),), "fixed", fingerprint(model, "made here"))


@pytest.mark.parametrize("name", MODELS)
def test_whoever_has_other_weights_has_another_fingerprint(name: str) -> None:
    """Each number of each configuration that changes what a checkpoint holds."""
    model = MODELS[name]
    own, tried = fingerprint(model), []
    for key, other in others(model):
        if shapes(other) != shapes(model):
            found = fingerprint(other)
            assert found.sites_hash != own.sites_hash, key
            tried.append(key)
    assert tried, "some number does"
    assert fingerprint(changed(model)) == own, "and the same numbers give the same"


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("flux1-dev", {"num_attention_heads": 4, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}),
        ("qwen-image", {"num_attention_heads": 4, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}),
        ("lumina2", {"num_attention_heads": 4, "num_kv_heads": 2, "axes_dim_rope": (2, 2, 4)}),
    ],
)
def test_weights_of_equal_shape_divided_among_other_heads_are_another_model(name: str, heads: dict[str, Any]) -> None:
    model = MODELS[f"native-{name}"]
    other = changed(model, **heads)
    assert sum(p.numel() for p in other.parameters()) == pytest.approx(
        sum(p.numel() for p in model.parameters()), rel=1e-2
    )
    assert fingerprint(other).sites_hash != fingerprint(model).sites_hash


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("native-flux1-dev", {"axes_dims_rope": (8, 4, 4)}),
        ("native-lumina2", {"sample_size": 64}),
        ("native-z-image", {"axes_lens": [1024, 32, 32]}),
        ("native-krea2", {"rope_theta": 1.0}),
        ("native-flux2-dev", {"eps": 1e-5}),
    ],
)
def test_what_is_no_size_of_the_model_does_not_turn_a_file_away(name: str, changes: dict[str, Any]) -> None:
    assert fingerprint(changed(MODELS[name], **changes)) == fingerprint(MODELS[name])


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("native")])
def test_a_calibration_of_another_size_is_refused(name: str) -> None:
    model = MODELS[name]
    key = next(key for key in ("num_layers", "n_layers") if key in model.config)
    check_model(file_of(model), model)
    wider = next(other for width, other in others(model) if width != key and shapes(other) != shapes(model))
    for other in (changed(model, **{key: 3}), wider):
        with pytest.raises(UserError, match=r"made for made here \(.*of another architecture or size"):
            check_model(file_of(model), other)


class Packed(nn.Linear):
    """A Linear whose weight is packed, as 4-bit weights are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def quantised(model: nn.Module) -> nn.Module:
    """What diffusers' quantisers leave behind, as far as it can be seen from outside."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, Packed(child))
    model.hf_quantizer = object()
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_model_is_the_one_it_was_made_of_and_no_other_size(name: str) -> None:
    """Packed weights have other shapes and counts; the configuration tells what they were."""
    plain, packed = CASES[name].pipe().transformer, quantised(CASES[name].pipe().transformer)
    assert fingerprint(packed) == fingerprint(plain)
    check_model(file_of(plain), packed)
    other = next(other for _, other in others(plain) if shapes(other) != shapes(plain))
    with pytest.raises(UserError, match="another architecture or size"):
        check_model(file_of(other), packed)


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_model_cannot_be_folded(name: str) -> None:
    packed = quantised(CASES[name].pipe().transformer)
    sites = find_sites(packed)
    # Z-Image and Lumina 2 fold into norms, which are not quantised.
    if name in ("z-image", "lumina2"):
        fold(packed, sites, torch.ones(len(sites)))
        return
    with pytest.raises(UserError, match="quantised or sharded.*keep the hooks"):
        fold(packed, sites, torch.ones(len(sites)))


def test_the_digest_looks_into_tensors_that_are_made_of_others() -> None:
    """As torchao's quantised weights are, of which the whole can be neither flattened nor turned into numbers."""

    def model(second: float) -> nn.Module:
        layer = nn.Linear(2, 2, bias=False)
        layer.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.full((2, 2), second)), requires_grad=False)
        return layer

    assert weights_digest(model(1.0)) == weights_digest(model(1.0))
    assert weights_digest(model(1.0)) != weights_digest(model(2.0))
