"""A file that is replaced, and a folder that is made, are whole at every moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calibri_lightning.atomic import making, replacing


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda source, target: (calls.append("replace"), rename(source, target)))
    with replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"a")
    assert calls == ["fsync", "replace", "fsync"], "the content, its name, and the folder that holds the name"


def cut_off(path: Path, error: type[BaseException], begun: bool) -> None:
    with replacing(path) as temporary:
        if begun:
            temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [False, True])
def test_after_any_error_the_old_file_stands_and_nothing_else(
    tmp_path: Path, error: type[BaseException], begun: bool
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error):
        cut_off(path, error, begun)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_with_the_folders_above_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    with making(folder) as temporary:
        (temporary / "x").write_text("x")
        assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["c"]
    assert (folder / "x").read_text() == "x"
    with pytest.raises(FileExistsError), making(folder):
        pytest.fail("it is there already")
    assert (folder / "x").read_text() == "x"


def fill_and_fail(folder: Path, error: type[BaseException]) -> None:
    with making(folder) as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "x").write_text("x")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_after_any_error_there_is_no_folder_and_none_above_it(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "a" / "b" / "c", tmp_path / "old" / "c"):
        with pytest.raises(error):
            fill_and_fail(folder, error)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert list((tmp_path / "old").iterdir()) == []
