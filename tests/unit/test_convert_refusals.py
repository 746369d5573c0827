"""Files that `convert` refuses, and how models accept what it made."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import official_calibri as official
import pytest
import tiny_pipelines
from safetensors.torch import load_file

from calibri_lightning import load_calibration
from calibri_lightning.__main__ import main
from calibri_lightning.adapters import LoraOptions, add_lora, write_adapter
from calibri_lightning.calibration import build_layout, find_sites, load_start, read_calibration
from calibri_lightning.errors import UserError
from calibri_lightning.tools.convert import from_official, order_of, read_official, to_official

FLUX, SD3, QWEN = "FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel"


def good(model: str = FLUX, granularity: str = "gate", members: int = 1) -> dict[str, Any]:
    shapes = order_of(official.tiny(model).transformer, granularity, members).shapes
    return official.document(official.vector(shapes["total"]), shapes)


def written(folder: Path, document: object, name: str = "cmaes_step_0400.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def changed(**parts: Any) -> dict[str, Any]:
    document = good()
    document["shapes"] = {**document["shapes"], **parts.pop("shapes", {})}
    return {**document, **parts}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"a": 1}, "neither an official Calibri checkpoint .* nor a calibration.json"),
        ([1, 2], "neither an official Calibri checkpoint"),
        (changed(solution=[]), "solution of .* must be a list of numbers"),
        (changed(solution="1"), "solution of .* must be a list of numbers"),
        (changed(solution=[1.0, float("nan")]), r"solution\[1\] of .* is nan, and must be a finite number"),
        (changed(solution=[float("-inf")]), r"solution\[0\] of .* is -inf"),
        (changed(solution=[10**400]), r"solution\[0\] of .* is 1000.*\.\.\., and must be a finite number"),
        (changed(solution=[True]), r"solution\[0\] of .* is True"),
        (changed(solution=[None]), r"solution\[0\] of .* is None"),
        (changed(shapes={"total": -1}), r"shapes\['total'\] of .* is -1, and must be a count"),
        (changed(shapes={"n_models": 1.0}), r"shapes\['n_models'\] of .* is 1.0, and must be a count"),
        ({**good(), "shapes": [3]}, "shapes of .* must be an object of counts"),
        (changed(step="4"), "step of .* must be a whole number"),
        (changed(sigma="small"), "sigma of .* must be a number or null"),
        (changed(timestamp="\ud800"), "is not JSON .*surrogates"),
        (changed(shapes={"\ud800": 1}), "is not JSON .*surrogates"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_official(written(tmp_path, document))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(solution=good()["solution"][:-1]), r"The solution has \d+ numbers and shapes\['total'\] says"),
        (changed(solution=[*good()["solution"], 1.0]), r"The solution has \d+ numbers"),
        (changed(shapes={"total": 3}), r"shapes\['total'\] says 3"),
        (changed(shapes={"n_double": 19}), r"shapes\['n_double'\] is 19, and this FluxTransformer2DModel has 2"),
        (changed(shapes={"n_models": 0}), r"shapes\['n_models'\] is 0.* at least one"),
        (changed(shapes={"n_models": 999_999}), r"shapes\['doubles_main'\]"),
        (good(SD3, members=2), r"shapes\['doubles_main'\] is absent.* another model, size or version"),
        (good(QWEN, members=2), r"shapes\['doubles_main'\] is absent"),
    ],
)
def test_checkpoints_that_do_not_fit_the_model(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_official(read_official(written(tmp_path, document)), official.tiny(FLUX).transformer, "some/model")


def test_members_that_the_official_code_did_not_run(tmp_path: Path) -> None:
    transformer = official.tiny(SD3).transformer
    one = read_official(written(tmp_path, good(SD3, members=1)))
    with pytest.raises(UserError, match="two, prompt and negative prompt"):
        from_official(one, transformer, "some/model")
    document = good(SD3, members=2)
    document["solution"][-2:] = [0.0, -0.0]
    with pytest.raises(UserError, match="All members' weights are 0.*runs the plain model"):
        from_official(read_official(written(tmp_path, document)), transformer, "some/model")


def test_members_of_an_earlier_version_that_saw_the_same_prompt(tmp_path: Path) -> None:
    document = good(QWEN, members=2)
    document["shapes"]["blocks"] = document["shapes"]["total"] - 2
    with pytest.raises(UserError, match="'blocks'.*both saw the prompt.*not converted"):
        from_official(read_official(written(tmp_path, document)), official.tiny(QWEN).transformer, "some/model")


def test_granularities_must_agree(tmp_path: Path) -> None:
    transformer = official.tiny(FLUX).transformer
    for real, asked in (("gate", "layer"), ("layer", "block"), ("block", "gate")):
        checkpoint = read_official(written(tmp_path, good(granularity=real)))
        with pytest.raises(UserError, match=f"granularity {asked} was given.*those of granularity {real}"):
            from_official(checkpoint, transformer, "some/model", asked)


def test_models_that_the_official_code_does_not_know() -> None:
    with pytest.raises(UserError, match="The model is a Lumina2Transformer2DModel. The official Calibri code knows"):
        order_of(official.tiny("Lumina2Transformer2DModel").transformer, "gate", 2)
    with pytest.raises(UserError, match="Official checkpoints of SD3Transformer2DModel have one scale a gate"):
        order_of(official.tiny(SD3).transformer, "layer", 2)


@pytest.mark.parametrize(("model", "members"), [(FLUX, "cfg"), (SD3, "single"), (SD3, 2)])
def test_members_that_the_official_code_does_not_know(model: str, members: Any) -> None:
    from calibri_lightning.calibration import CalibrationFile, fingerprint

    transformer = official.tiny(model).transformer
    layout = build_layout(find_sites(transformer), "gate", members, 3.0)
    values = tuple(layout.start.tolist())
    file = CalibrationFile(layout.names, values, "gate", layout.members, "raw", fingerprint(transformer))
    with pytest.raises(UserError, match="It cannot be converted"):
        to_official(file, transformer)


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_read_as_data_or_not_at_all(tmp_path: Path, protocol: int) -> None:
    plain, trapped = tmp_path / "plain.pkl", tmp_path / "cmaes_state_0400.pkl"
    plain.write_bytes(pickle.dumps(good(), protocol))
    assert read_official(plain) == read_official(written(tmp_path, good()))
    mark = tmp_path / "mark"
    trapped.write_bytes(pickle.dumps({**good(), "es": Trap(mark)}, protocol))
    with pytest.raises(UserError, match="is a pickle.*is not run.*Refused.*give the cmaes_step_"):
        read_official(trapped)
    assert not mark.exists()


def test_the_state_of_an_official_run_is_refused(tmp_path: Path) -> None:
    import cma

    state = tmp_path / "cmaes_state_0400.pkl"
    state.write_bytes(cma.CMAEvolutionStrategy([0.0] * 3, 0.25, {"verbose": -9}).pickle_dumps())
    with pytest.raises(UserError, match=r"asks for cma\.evolution_strategy.*more than plain data.*optimiser itself"):
        read_official(state)


def test_files_are_bounded_before_they_are_parsed(tmp_path: Path) -> None:
    for name, size in (("large.json", 5 << 20), ("large.pkl", 65 << 20)):
        path = tmp_path / name
        with path.open("wb") as stream:
            stream.truncate(size)  # of zeros that take no space
        with pytest.raises(UserError, match="has more than (4|64) MiB"):
            read_official(path)
    # 3 MB that ask for as many values: refused by their number, not by the memory that they take.
    many = tmp_path / "many.pkl"
    many.write_bytes(b"(" + b"N" * (3 << 20) + b"l.")
    with pytest.raises(UserError, match="more than 100000 opcodes"):
        read_official(many)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = written(tmp_path, good()), tmp_path / "calibration.json"
    assert "The following arguments are required" in fails(capsys)
    assert "does not know its model. Give --model: one of flux1-dev" in fails(capsys, source, "--out", out)
    assert "It must be one of flux1-dev" in fails(capsys, source, "--model", "flux9", "--out", out)
    assert "has 38 with granularity gate" in fails(capsys, source, "--model", "flux1-dev", "--out", out)
    assert "holds no transformer" in fails(capsys, source, "--model", tmp_path, "--out", out)
    assert "No such file" in fails(capsys, tmp_path / "absent.json", "--model", "flux1-dev", "--out", out)
    assert "directory" in fails(capsys, tmp_path, "--model", "flux1-dev", "--out", out)
    for content in (b"", b"\xff\xfe", b"{", b"[" * 100_000, b"PK\x03\x04"):
        (tmp_path / "other.bin").write_bytes(content)
        assert "is not JSON" in fails(capsys, tmp_path / "other.bin", "--model", "flux1-dev", "--out", out)
    assert not out.exists()
    words = ["--model", str(folder_of(official.tiny(FLUX).transformer, tmp_path / "model"))]
    assert "cannot be written" in fails(capsys, source, *words, "--out", tmp_path / "absent" / "out.json")
    assert "cannot be written" in fails(capsys, source, *words, "--out", source / "out.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    assert "exists already" in fails(capsys, source, *words, "--out", tmp_path / "link.json")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or path == out]
    before = source.read_bytes()
    assert "exists already" in fails(capsys, source, "--model", "flux1-dev", "--out", source)
    assert source.read_bytes() == before


def folder_of(transformer: Any, folder: Path) -> Path:
    transformer.save_config(folder / "transformer")
    return folder


def test_what_was_made_is_accepted_by_its_architecture_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny_pipelines.fresh(tiny_pipelines.flux1)
    shapes = order_of(pipe.transformer, "layer", 2).shapes
    document = official.document(official.vector(shapes["total"]), shapes)
    source, out = written(tmp_path, document), tmp_path / "calibration.json"
    model = folder_of(pipe.transformer, tmp_path / "model")
    assert main(["convert", str(source), "--model", str(model), "--out", str(out)]) == 0
    file = read_calibration(out)
    assert (file.adapter, file.weights) == (None, None)
    load_calibration(pipe, out)
    layout = build_layout(find_sites(pipe.transformer), "layer", 2)
    assert load_start(out, layout, pipe.transformer).tolist() == list(file.values)
    with pytest.raises(UserError, match="Scales belong to one architecture"):
        load_calibration(tiny_pipelines.fresh(tiny_pipelines.flux1, guidance_embeds=False), out)
    back = tmp_path / "back.json"
    capsys.readouterr()
    assert "Give its folder as --model" in fails(capsys, out, "--out", back)
    assert "Leave --granularity and --adapter out" in fails(capsys, out, "--granularity", "gate", "--out", back)
    assert main(["convert", str(out), "--model", str(model), "--out", str(back)]) == 0
    assert json.loads(back.read_text()) == document


def test_an_adapter_is_named_and_asked_for(tmp_path: Path) -> None:
    pipe = tiny_pipelines.fresh(tiny_pipelines.flux1)
    plain = copy.deepcopy(pipe)
    source, out = tmp_path / "source.json", tmp_path / "calibration.json"
    shapes = order_of(pipe.transformer, "gate", 1).shapes
    source.write_text(json.dumps(official.document([*official.vector(shapes["total"] - 1), 1.0], shapes)))
    model = folder_of(pipe.transformer, tmp_path / "model")
    add_lora(pipe.transformer, LoraOptions(rank=2), seed=0)
    adapter = tmp_path / "lora"
    digest = write_adapter(adapter, pipe.transformer)
    assert load_file(adapter / "adapter_model.safetensors")
    words = ["--model", str(model), "--adapter", str(adapter), "--out", str(out)]
    assert main(["convert", str(source), *words]) == 0
    record = read_calibration(out).adapter
    assert record is not None
    assert (record.source, record.sha256, record.merged) == (str(adapter), digest, True)
    with pytest.raises(UserError, match="was found on the adapter .*check_adapter=False"):
        load_calibration(plain, out)
    load_calibration(pipe, out)
    load_calibration(plain, out, check_adapter=False)


def test_a_record_that_was_edited_is_refused(tmp_path: Path) -> None:
    from calibri_lightning.calibration import write_calibration

    transformer = official.tiny(QWEN).transformer
    path = tmp_path / "calibration.json"
    checkpoint = read_official(written(tmp_path, good(QWEN, members=2)))
    write_calibration(path, from_official(checkpoint, transformer, "some/model").file)
    whole = json.loads(path.read_text())
    name = next(iter(whole["official"]["unused"]))
    for key, value in (("step", 1.5), ("model", None), ("unused", []), ("val", "good"), ("unused", {name: None})):
        path.write_text(json.dumps({**whole, "official": {**whole["official"], key: value}}))
        with pytest.raises(UserError, match="official.* was edited or cut"):
            read_calibration(path)
