"""The push to the Hub, down to the requests that leave the machine."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import create_autospec

import pytest
from export_tools import Family, write_run
from fake_hub import TOKEN, FakeHub
from huggingface_hub import HfApi

import calibri_lightning.tools.export.run as export_run
from calibri_lightning.__main__ import main
from calibri_lightning.errors import UserError
from calibri_lightning.tools.export.push import Target, check_target, push

COMMIT = "POST /api/models/owner/name/commit/main"
SETTINGS = "PUT /api/models/owner/name/settings"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    base = Family("sd3").save(folder / "base")
    return write_run(folder / "run", base, members="cfg", weight_mode="raw")


def exported(run: Path, out: Path, *flags: str) -> int:
    return main(["export", str(run), "--out", str(out), "--push", "owner/name", *flags])


@pytest.mark.parametrize("public", [False, True])
def test_the_folder_arrives_whole_in_one_commit_and_nobody_sees_it_before(
    tmp_path: Path, run: Path, monkeypatch, capsys, public: bool
) -> None:
    out = tmp_path / "out"
    with FakeHub().listening(monkeypatch) as hub:
        assert exported(run, out, *["--public"] * public) == 0
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert hub.repositories == {"owner/name": files}
    assert hub.private == {"owner/name": not public}
    assert hub.seen.count(COMMIT) == 1
    created = hub.seen.index("POST /api/repos/create")
    assert created < hub.seen.index(COMMIT)
    assert (SETTINGS in hub.seen[hub.seen.index(COMMIT) :]) is public, "it is made public after it is whole"
    assert "load_calibration(pipe, folder)" in files["README.md"].decode()
    assert 'snapshot_download("owner/name")' in files["README.md"].decode()
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    assert not any(TOKEN.encode() in content for content in files.values())


def test_a_repository_that_exists_is_not_touched(tmp_path: Path, run: Path, monkeypatch, capsys) -> None:
    hub = FakeHub({"owner/name": {"README.md": b"theirs"}}, {"owner/name": False})
    with hub.listening(monkeypatch):
        assert exported(run, tmp_path / "out") == 2
        # Nor one that somebody makes between the check and the upload.
        with pytest.raises(UserError, match="could not be made"):
            push(tmp_path, Target("owner/name"), HfApi(), "message")
    assert "exists, and a push makes a new one" in capsys.readouterr().err
    assert hub.repositories == {"owner/name": {"README.md": b"theirs"}}
    assert not [line for line in hub.seen if line.startswith(("PUT", "DELETE")) or "commit" in line]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fails_at", "message", "left"),
    [
        ("/repos/create", "is whole, but the repository owner/name could not be made", None),
        ("/commit/main", "could not be uploaded .*is private and empty. Go on with: hf upload owner/name ", True),
        ("/settings", "All is uploaded to owner/name, but the repository could not be made public", True),
    ],
)
def test_an_upload_that_breaks_off_leaves_the_folder_and_nothing_public(
    tmp_path: Path, run: Path, monkeypatch, fails_at: str, message: str, left: bool | None
) -> None:
    (tmp_path / "README.md").write_text("# All of it")
    with FakeHub(fails_at=fails_at).listening(monkeypatch) as hub, pytest.raises(UserError, match=message):
        push(tmp_path, Target("owner/name", public=True), HfApi(), "message")
    assert hub.private.get("owner/name") is left
    assert hub.repositories.get("owner/name") in (None, {}, {"README.md": b"# All of it"})
    assert (tmp_path / "README.md").is_file()


@pytest.mark.parametrize(
    ("account", "message"),
    [
        (
            {"name": "somebody", "orgs": [{"name": "a-lab"}]},
            "the Hub is somebody, in the organisations a-lab",
        ),
        ({"name": "Owner", "auth": {"accessToken": {"role": "read"}}}, "may read alone"),
    ],
)
def test_an_account_that_may_not_write_there_is_told_before_any_work(monkeypatch, account, message: str) -> None:
    with FakeHub(account=account).listening(monkeypatch) as hub, pytest.raises(UserError, match=message):
        check_target(Target("owner/name"), HfApi())
    assert hub.repositories == {}


def stub(**answers: object) -> HfApi:
    """Takes only calls that fit the documented signatures of HfApi."""
    api = create_autospec(HfApi, instance=True)
    api.whoami.return_value = {"name": "owner"}
    api.repo_exists.return_value = False
    for name, answer in answers.items():
        getattr(api, name).side_effect = answer
    return api


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"whoami": OSError("no token")}, "hf auth login"),
        ({"repo_exists": ConnectionError("no route")}, "check the network"),
    ],
)
def test_a_hub_that_refuses_does_so_before_any_work(tmp_path: Path, monkeypatch, capsys, answers, message: str) -> None:
    api = stub(**answers)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr(export_run, "read_finished", lambda folder: pytest.fail("work was done"))
    assert exported(tmp_path, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not api.create_repo.called
