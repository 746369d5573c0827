from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from calibration_models import tiny_flux, tiny_sd3

from calibri_lightning.calibration import (
    CalibrationFile,
    ObtainedBy,
    build_layout,
    check_model,
    find_sites,
    fingerprint,
    layout_for,
    read_calibration,
    write_calibration,
)
from calibri_lightning.errors import UserError

MODEL = tiny_sd3()


def example(members="cfg", granularity="gate", weight_mode="raw") -> CalibrationFile:
    layout = build_layout(find_sites(MODEL), granularity, members, guidance_scale=4.0, weight_mode=weight_mode)
    return CalibrationFile(
        names=layout.names,
        values=tuple(1 / (3 + i) for i in range(layout.num_parameters)),
        granularity=granularity,
        members=layout.members,
        weight_mode=weight_mode,
        model=fingerprint(MODEL, "some/mödel"),
        obtained_by=ObtainedBy("PairES", "shapes", 8, 5120, 3, 0.25, 1 / 3, "0.1.0"),
    )


@pytest.mark.parametrize(
    ("members", "granularity", "mode"),
    [("single", "block", "fixed"), ("cfg", "gate", "raw"), ("cfg", "layer", "guidance"), (3, "gate", "raw")],
)
def test_round_trip_is_exact(tmp_path: Path, members, granularity, mode) -> None:
    file = example(members, granularity, mode)
    write_calibration(tmp_path / "calibration.json", file)
    assert read_calibration(tmp_path / "calibration.json") == file
    assert layout_for(file, MODEL).names == file.names
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write_calibration(tmp_path / "a.json", example())
    write_calibration(tmp_path / "b.json", example())
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_dropped_sites_stay_dropped(tmp_path: Path) -> None:
    sites = find_sites(MODEL)
    layout = build_layout(sites[:2] + sites[4:], "gate", "single")
    file = replace(example(), names=layout.names, values=tuple(layout.start.tolist()), members=layout.members)
    assert layout_for(file, MODEL) == layout


def test_the_fingerprint_knows_models_apart_and_ignores_a_lora() -> None:
    from peft import LoraConfig

    same = tiny_sd3()
    same.add_adapter(LoraConfig(r=2, target_modules=["to_q", "norm1.linear"]))
    assert fingerprint(same) == fingerprint(MODEL)
    hashes = {fingerprint(m).sites_hash for m in (MODEL, tiny_sd3(num_layers=4), tiny_sd3(dual=()), tiny_flux())}
    assert len(hashes) == 4


@pytest.mark.parametrize("build", [tiny_flux, lambda: tiny_sd3(num_layers=4)])
def test_a_calibration_of_another_model_is_refused(build) -> None:
    with pytest.raises(
        UserError, match=r"made for some/mödel \(SD3Transformer2DModel.*model given is a .*calibrate this one"
    ):
        check_model(example(), build())
    check_model(example(), tiny_sd3())


def edited(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "calibration.json"
    write_calibration(path, example())
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format_version 2\. .*reads version 1.*Install the version"),
        ({"format_version": None}, "format_version None"),
        ({"format": "other"}, "not a calibration"),
        ({"values": {"member0/a": float("nan")}}, r"value of member0/a is nan.*finite"),
        ({"values": {"member0/a": float("inf")}}, "value of member0/a is inf"),
        ({"values": {"member0/a": None}}, "value of member0/a is None"),
        ({"values": {"member0/a": "1.0"}}, "value of member0/a is '1.0'"),
        ({"values": {"member0/a": True}}, "value of member0/a is True"),
        ({"values": [1.0, 2.0]}, r"'values' of the file is \[1.0, 2.0\], and must be a dict"),
        ({"members": None}, "'members' of the file is None"),
        ({"members": [3]}, r"members\[0\] is 3"),
        ({"members": [{"prompt": "image", "weight": 1}]}, r"prompt of members\[0\] is 'image'"),
        ({"members": [{"prompt": "prompt"}]}, r"members\[0\].weight is None"),
        ({"granularity": "head"}, "granularity is 'head'"),
        ({"weight_mode": "learned"}, "weight_mode is 'learned'"),
        ({"model": {"transformer_class": "X"}}, "'num_parameters' of model is None"),
    ],
)
def test_an_edited_file_is_refused_by_name(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = edited(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        read_calibration(path)
    assert str(error.value).startswith(str(path))


def test_unknown_facts_about_a_run_are_ignored(tmp_path: Path) -> None:
    path = edited(tmp_path, obtained_by={"strategy": "CMAES", "new_in_2027": 1})
    assert read_calibration(path).obtained_by == ObtainedBy(strategy="CMAES")


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"format": "calibri_light', "[1, 2", "\x00", '{"a": 1, "a": 2}', "[]", "3", '"text"'],
)
def test_any_other_content_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"calibration\.json"):
        read_calibration(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, example("single", "block"))
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_calibration(path)


def test_missing_foreign_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no calibration at"):
        read_calibration(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_calibration(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_calibration(tmp_path / "binary")


def test_names_must_be_those_that_granularity_and_members_imply() -> None:
    file = example()
    with pytest.raises(UserError, match=r"has 23 values, .* imply 24; it differs at member1/weight"):
        layout_for(replace(file, names=file.names[:-1], values=file.values[:-1]), MODEL)
    with pytest.raises(UserError, match="granularity block.*differs at"):
        layout_for(replace(file, granularity="block"), MODEL)
    with pytest.raises(UserError, match="the order differs"):
        layout_for(replace(file, names=file.names[::-1]), MODEL)
    with pytest.raises(UserError, match="23 values"):
        replace(file, values=file.values[:-1])
    with pytest.raises(UserError, match="nan"):
        replace(file, values=(*file.values[:-1], float("nan")))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, example())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written to .*No space left on device.*untouched"):
        write_calibration(path, replace(example(), weight_mode="fixed"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory.*folder must exist"):
        write_calibration(tmp_path / "none" / "calibration.json", example())
