"""What differs between ranks is found and named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calibri_lightning.errors import UserError
from calibri_lightning.launch import agreement
from calibri_lightning.launch.agreement import (
    checksum,
    flat,
    require_agreement,
    require_same_bits,
    require_shared,
    versions,
)


def trainer(texts: Sequence[str] | None = None, rank: int = 0) -> SimpleNamespace:
    """A rank whose others say what is given; what rank 0 sends is what this rank has."""

    def broadcast(value: object, src: int = 0) -> object:
        return value if texts is None or src == rank else texts[src]

    return SimpleNamespace(
        world_size=2 if texts is None else len(texts), global_rank=rank, strategy=SimpleNamespace(broadcast=broadcast)
    )


def test_settings_are_laid_out_by_name() -> None:
    settings = {"model": {"backbone": {"init_args": {"dtype": "bfloat16"}}, "rewards": {}}, "name": None}
    assert flat(settings) == {
        "model.backbone.init_args.dtype": "bfloat16",
        "model.rewards": "{}",
        "name": "None",
    }


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ('{"": "b", "steps": "8"}', "Rank 1 on b has other settings than rank 0 .*: steps is '8' there and '4' on"),
        ('{"": "b"}', "steps is absent there and '4' on rank 0"),
        ('{"": "b", "steps": "4", "more": "1"}', "more is '1' there and absent on rank 0"),
        ('{"": "b", "steps": "5", "more": "1"}', r"\(and 1 more\)"),
    ],
)
def test_the_rank_and_the_fact_that_differ_are_named(other: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        require_agreement(trainer(["", other]), "settings", {"steps": "4"}, "Fix it.")


def test_equal_ranks_agree_and_machines_may_have_other_names() -> None:
    require_agreement(trainer(["", '{"": "elsewhere", "steps": "4"}']), "settings", {"steps": "4"}, "")
    require_agreement(SimpleNamespace(world_size=1), "settings", {}, "")


def test_versions_name_what_results_depend_on() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert set(agreement.PACKAGES) < set(found)
    assert found["Python"].count(".") == 1


def test_a_folder_that_another_rank_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_shared(trainer(), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == [], "nothing is left behind"
    monkeypatch.setattr(agreement, "_PATIENCE", 0.1)
    with pytest.raises(UserError, match="rank 1 on other do"):
        require_shared(trainer(["", '[false, "other"]']), tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Rank 0 cannot write"):
        require_shared(trainer(), tmp_path / "file" / "run")


def test_one_other_bit_on_one_rank_is_noticed() -> None:
    def gather(values: np.ndarray) -> list[np.ndarray]:
        return [values, values, values + 1]

    require_same_bits(lambda values: [values] * 3, "rewards", 2**200 + 5)
    with pytest.raises(UserError, match=r"Rank\(s\) 2 of 3 have other rewards"):
        require_same_bits(gather, "rewards", 2**60 + 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_checksum_knows_every_bit_and_every_place(dtype: torch.dtype) -> None:
    one, two = torch.arange(12).to(dtype).view(3, 4), torch.ones(5).to(dtype)
    whole = checksum([one, two])
    assert checksum([one.clone().T.contiguous().T, two]) == whole
    assert checksum([two, one]) != whole
    for place in range(12):
        changed = one.clone()
        changed.view(-1).view(torch.uint8)[place * one.element_size()] ^= 1
        assert checksum([changed, two]) != whole
