"""What export refuses, in one message, leaving nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipelines as tiny
from export_tools import Family, write_run, write_test

import calibri_lightning.tools.export.run as export_run
from calibri_lightning.__main__ import main
from calibri_lightning.adapters import write_transformer
from calibri_lightning.calibration.files import read_calibration
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.errors import UserError
from calibri_lightning.shapes.pipeline import TINY, build_pipeline
from calibri_lightning.tools.export import folded
from calibri_lightning.tools.export.run import Options, export
from calibri_lightning.tools.finished import read_finished

SD3 = Family("sd3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SD3.save(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run with nothing wrong."""
    return write_run(tmp_path_factory.mktemp("runs") / "whole", base, parts=("scales", "adapter"))


def refused(options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(options)
    around = options.out.parent.iterdir() if options.out.parent.exists() else ()
    assert not [path for path in around if path.name.startswith((options.out.name, "."))], "nothing is left behind"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "calibration.json").unlink(), "has no calibration.json.*Let the fit end"),
        (lambda run: (run / "config.yaml").unlink(), "has no config.yaml"),
        (lambda run: cut(run / "calibration.json"), "is not valid JSON"),
        (lambda run: (run / "config.yaml").write_text("model: {"), "not the configuration of a fit"),
        (lambda run: (run / "config.yaml").write_text("model: {num_steps: 3}"), "not the configuration of a fit"),
        (lambda run: (run / "summary.json").write_text('{"format_version": 1'), "summary.json cannot be read"),
        (lambda run: (run / "adapter").rename(run / "away"), r"has no adapter/.*Copy it back"),
        (lambda run: cut(run / "adapter" / "adapter_model.safetensors"), "not a complete safetensors file"),
        (lambda run: (run / "adapter" / "adapter_config.json").unlink(), "has no adapter_config.json"),
    ],
)
def test_half_written_runs(tmp_path: Path, whole: Path, break_it: Callable[[Path], None], message: str) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    break_it(run)
    refused(Options(run, tmp_path / "out"), message)


def test_a_folder_of_runs_names_those_that_it_holds(tmp_path: Path, base: Path) -> None:
    write_run(tmp_path / "runs" / "version_0", base)
    refused(Options(tmp_path / "runs", tmp_path / "out"), "folders version_0 have one: give one of these")
    refused(Options(tmp_path / "nothing", tmp_path / "out"), "is not a folder")


def test_files_of_two_runs(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base, parts=("scales", "adapter"))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    refused(Options(run, tmp_path / "out"), "another adapter/ than the one")
    alone = write_run(tmp_path / "alone", base)
    (run / "adapter").rename(alone / "adapter")
    refused(Options(alone, tmp_path / "out"), r"has adapter/, of which its calibration.json says nothing")


def test_numbers_of_another_calibration(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base)
    own = read_calibration(run / "calibration.json")
    for sha256, told in ((own.sha256, True), ("", True), (replace(own, values=own.values[::-1]).sha256, False)):
        write_test(run, sha256)
        if told:
            assert read_finished(run).summary is not None
        else:
            refused(Options(run, tmp_path / "out"), "the numbers of another calibration")


def test_trained_weights_that_are_gone_or_others(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base, parts=("full",))
    write_transformer(run / "transformer", build_pipeline(TINY, seed=9).transformer)
    refused(Options(run, tmp_path / "out"), "other weights")
    (run / "transformer" / "config.json").unlink()
    refused(Options(run, tmp_path / "out"), "has trained weights.*Copy that folder back")


def test_runs_of_other_models(tmp_path: Path, base: Path) -> None:
    larger = tmp_path / "larger"
    build_pipeline(replace(TINY, num_layers=4)).save_pretrained(larger)
    run = write_run(tmp_path / "run", base)
    refused(Options(run, tmp_path / "out", base=str(larger)), "of another architecture or size")
    flux = Family("flux1-dev").save(tmp_path / "flux")
    refused(Options(run, tmp_path / "out", base=str(flux)), "holds a FluxPipeline; this backbone needs a StableDiff")
    refused(Options(run, tmp_path / "out", base=str(tmp_path / "gone")), "neither an existing folder")


def test_quantised_models(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base, quantization="int8")
    refused(Options(run, tmp_path / "out"), r"quantised to int8.*--form calibration")
    assert export(Options(run, tmp_path / "scales", form="calibration")).form == "calibration"
    stored = SD3.save(tmp_path / "stored")
    config = json.loads((stored / "transformer" / "config.json").read_text())
    (stored / "transformer" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    plain = write_run(tmp_path / "plain", base)
    refused(Options(plain, tmp_path / "out", base=str(stored)), "stored quantised.*--base")


def test_sites_that_cannot_be_folded_are_named(tmp_path: Path, base: Path, monkeypatch) -> None:
    run = write_run(tmp_path / "run", base)
    whole = folded.layout_for

    def without_folds(file, transformer):
        layout = whole(file, transformer)
        return replace(layout, sites=tuple(replace(s, fold=None) if s.stream == "text" else s for s in layout.sites))

    names = [site.name for site in find_sites(build_pipeline(TINY).transformer) if site.stream == "text"]
    monkeypatch.setattr(folded, "layout_for", without_folds)
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    refused(
        Options(run, tmp_path / "out"),
        rf"cannot be folded\. Sites {re.escape(listed)} cannot be folded.*--form calibration",
    )
    # Where the adapter alone was trained, all scales are 1 and no site needs a fold.
    export(Options(write_run(tmp_path / "other", base, parts=("adapter",)), tmp_path / "out"))


def test_several_members_and_base_do_not_go_with_the_other_form(tmp_path: Path, base: Path) -> None:
    pair = write_run(tmp_path / "pair", base, members="cfg", weight_mode="raw")
    refused(Options(pair, tmp_path / "out", form="folder"), r"has 2 members.*one set of weights")
    refused(Options(pair, tmp_path / "out", base=str(base)), "--base .* is for a folded folder")


def test_output_that_exists_or_cannot_be_written(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "file", "link"):
        with pytest.raises(UserError, match="exists, and an export makes a new folder"):
            export(Options(whole, tmp_path / name))
    with pytest.raises(UserError, match="cannot be written"):
        export(Options(whole, tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "kept"


def test_output_inside_what_is_copied(tmp_path: Path, base: Path, whole: Path) -> None:
    before = {folder: sorted(folder.rglob("*")) for folder in (base, whole)}
    (tmp_path / "link").symlink_to(whole)
    refused(Options(whole, whole / "out"), "inside the folder of the run")
    refused(Options(whole, tmp_path / "link" / "exports" / "out"), "inside the folder of the run")
    refused(Options(whole, base / "vae" / "out"), "inside the folder of its base model")
    assert {folder: sorted(folder.rglob("*")) for folder in (base, whole)} == before


def disk_full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def ctrl_c(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def terminated(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("stop", "code"), [(disk_full, 2), (ctrl_c, 130), (terminated, 143)])
@pytest.mark.parametrize("form", ["folder", "calibration"])
def test_an_export_that_breaks_off_leaves_nothing(
    tmp_path: Path, whole: Path, monkeypatch, stop: Callable[..., None], code: int, form: str
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(export_run.Card, "render", stop)  # the last file: all others are there
    assert main(["export", str(whole), "--out", str(tmp_path / "new" / "out"), "--form", form]) == code
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_command_line_says_it_in_one_line(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", base)
    capsys.readouterr()
    for arguments, message in (
        ([], "required: RUN, --out"),
        ([str(run), "--out", str(tmp_path / "out"), "--public"], "Add --push OWNER/NAME"),
        ([str(run), "--out", str(tmp_path / "out"), "--push", "no owner"], "must be OWNER/NAME"),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "out")], "is not a folder"),
    ):
        assert main(["export", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error:")
        assert message in line
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "from_pretrained" in capsys.readouterr().out


def test_pipelines_without_one_transformer(tmp_path: Path, base: Path) -> None:
    wan = tmp_path / "wan"
    tiny.fresh(tiny.wan).save_pretrained(wan)
    index = json.loads((wan / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (wan / "model_index.json").write_text(json.dumps(index))
    (wan / "transformer_2").symlink_to(wan / "transformer")
    run = write_run(tmp_path / "run", base, backbone="Stock")
    refused(Options(run, tmp_path / "out", base=str(wan)), "has not one diffusion transformer")
