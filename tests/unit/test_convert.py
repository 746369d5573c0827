"""Official checkpoints, as the official code applies them, against ours; there and back without a bit lost."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import official_calibri as official
import pytest
import torch
from site_models.released import FULL_SIZES
from torch import nn

from calibri_lightning.__main__ import main
from calibri_lightning.calibration import (
    attach,
    build_layout,
    find_sites,
    fingerprint,
    layout_for,
    load_start,
    probe,
    read_calibration,
    write_calibration,
)
from calibri_lightning.sampling.guidance import combined
from calibri_lightning.tools.convert import OfficialCheckpoint, from_official, order_of, read_official, to_official
from calibri_lightning.tools.convert.models import NAMES, find_model

FLUX, SD3, QWEN = "FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel"
KINDS = [
    (FLUX, "gate", 1),
    (FLUX, "gate", 3),
    (FLUX, "layer", 2),
    (FLUX, "block", 1),
    (SD3, "gate", 2),
    (QWEN, "gate", 2),
]
kinds = pytest.mark.parametrize(("model", "granularity", "members"), KINDS)
SHAPES = {
    ("flux1-dev", "gate", 1): {
        **{"total": 115, "n_models": 1, "doubles_main": 38, "doubles_ctx": 38, "singles": 38},
        **{"n_double": 19, "n_single": 38},
    },
    ("flux1-dev", "layer", 2): {
        **{"total": 154, "n_models": 2, "doubles_main": 76, "singles": 76, "n_double": 19, "n_single": 38}
    },
    ("flux1-dev", "block", 1): {
        **{"total": 58, "n_models": 1, "doubles_main": 19, "singles": 38, "n_double": 19, "n_single": 38}
    },
    ("sd3.5-medium", "gate", 2): {
        **{"total": 216, "n_models": 2, "main": 96, "context": 92, "attn2": 26},
        **{"n_blocks": 24, "n_context": 23, "n_attn2": 13},
    },
    ("sd3.5-large", "gate", 2): {
        **{"total": 302, "n_models": 2, "main": 152, "context": 148, "attn2": 0},
        **{"n_blocks": 38, "n_context": 37, "n_attn2": 0},
    },
    ("qwen-image", "gate", 2): {"total": 482, "n_models": 2, "n_blocks": 60},
}
"""As the official trainer writes them for the released models."""


def example(model: str, granularity: str, members: int, seed: int = 0) -> tuple[nn.Module, OfficialCheckpoint]:
    transformer = official.tiny(model).transformer
    shapes = order_of(transformer, granularity, members).shapes
    return transformer, OfficialCheckpoint(tuple(official.vector(shapes["total"], seed)), shapes, 400, 13.3, 12.2, 12.9)


@kinds
def test_a_converted_vector_acts_as_in_the_official_code(model: str, granularity: str, members: int) -> None:
    tiny = official.tiny(model)
    transformer, checkpoint = example(model, granularity, members)
    numbers = list(checkpoint.solution)
    expected = official.run(tiny, official.tables(transformer, numbers, members, granularity), numbers[-members:])

    file = from_official(checkpoint, transformer, "some/model").file
    layout = layout_for(file, transformer)
    scales, weights = layout.rows(torch.tensor([file.values], dtype=torch.float64))
    attachment = attach(transformer, layout.sites)
    try:
        velocities = []
        for row, member in zip(scales[0], layout.members, strict=True):
            seen = official.seeing(tiny, member.prompt == "negative")
            attachment.set_rows(row.expand(3, -1))
            velocities.append(seen())
    finally:
        attachment.detach()
    found = combined(torch.stack(velocities, dim=1), weights.expand(3, -1))
    assert (found - expected).norm() / expected.norm() < 2e-6
    plain = official.run(tiny, [{} for _ in range(members)], numbers[-members:])
    assert (plain - expected).norm() / expected.norm() > 1e-2, "the scales of the example must matter"


@kinds
def test_there_and_back_is_exact(tmp_path: Path, model: str, granularity: str, members: int) -> None:
    transformer, checkpoint = example(model, granularity, members)
    odd = (0.1 + 0.2, -0.0, 5e-324, 1.0, 1e-17, 1.7976931348623157e308, 1, -1)
    numbers = [*odd, *checkpoint.solution][: len(checkpoint.solution)]
    numbers[-members:] = [1.0, *[0.30000000000000004] * (members - 1)]
    source = tmp_path / "cmaes_step_0400.json"
    source.write_text(json.dumps(official.document(numbers, dict(checkpoint.shapes))))
    read = read_official(source)
    write_calibration(tmp_path / "calibration.json", from_official(read, transformer, "some/model").file)
    back = to_official(read_calibration(tmp_path / "calibration.json"), transformer).checkpoint
    assert back == read
    assert struct.pack(f"{len(numbers)}d", *back.solution) == struct.pack(f"{len(numbers)}d", *numbers)


@pytest.mark.parametrize(("name", "granularity", "members"), SHAPES)
def test_orders_of_the_released_models(name: str, granularity: str, members: int) -> None:
    transformer = find_model(name).transformer
    order = order_of(transformer, granularity, members)
    assert order.shapes == SHAPES[name, granularity, members]
    # Entry i holds i: what does the official code scale by it, and what is it called here?
    numbers = [float(i) for i in range(order.shapes["total"])]
    applied = official.tables(transformer, numbers, members, granularity)
    paths = {module: path for path, module in transformer.named_modules()}
    seen = {
        number: f"member{m}/{_name(paths[module], index, granularity)}"
        for m, table in enumerate(applied)
        for module, scales in table.items()
        for index, number in scales.items()
    }
    assert [seen[i] for i in range(len(numbers) - members)] == list(order.names[:-members])
    assert order.names[-members:] == tuple(f"member{m}/weight" for m in range(members))


def _name(path: str, index: int, granularity: str) -> str:
    """Our name of an element of a module's output, from what the modules are called in diffusers."""
    block, _, module = path.rpartition(".")
    if block.startswith("single_"):
        return {"gate": f"{block}.fused.joint", "layer": f"{block}.fused", "block": block}[granularity]
    if module in ("img_mlp", "txt_mlp"):
        layer, stream = "mlp", "image" if module == "img_mlp" else "text"
    elif module == "attn":
        layer, stream = "attn", ("image", "text")[index]
    else:
        layer, stream = {1: "attn", 4: "mlp", 6: "attn2"}[index], "text" if module == "norm1_context" else "image"
    return {"gate": f"{block}.{layer}.{stream}", "layer": f"{block}.{layer}", "block": block}[granularity]


def test_models_by_name_have_the_released_sizes() -> None:
    sizes = {size.name.lower().replace(".", ""): size for size in FULL_SIZES}
    for name in NAMES:
        key = {"flux1-dev": "flux1-dev"}.get(name, name.replace(".", ""))
        assert fingerprint(find_model(name).transformer) == fingerprint(sizes[key].build())


def test_what_is_inert_in_qwen_is_said_and_set_to_1(tmp_path: Path) -> None:
    transformer, checkpoint = example(QWEN, "gate", 2)
    made = from_official(checkpoint, transformer, "some/model")
    values = dict(zip(made.file.names, made.file.values, strict=True))
    mlps = {name: value for name, value in values.items() if ".mlp." in name}
    assert set(mlps.values()) == {1.0}
    said = " ".join(made.notes)
    assert "6 scales of MLPs have no effect in the official code" in said
    assert "4 scales are left out" in said
    assert "member1/transformer_blocks.1.attn.text" in said
    assert "rescale" in said
    # A run here leaves out what its probe finds dead: a new run can start from the file.
    tiny, sites = official.tiny(QWEN), find_sites(transformer)
    attachment = attach(transformer, sites)
    try:
        dead = probe(attachment, tiny)
    finally:
        attachment.detach()
    layout = build_layout([site for site in sites if site not in dead], "gate", "cfg", 4.0)
    write_calibration(tmp_path / "calibration.json", made.file)
    start = load_start(tmp_path / "calibration.json", layout, transformer)
    assert start.tolist() == list(made.file.values)


def test_only_checkpoints_of_qwen_have_inert_scales() -> None:
    for model, granularity, members in KINDS[:-1]:
        transformer, checkpoint = example(model, granularity, members)
        made = from_official(checkpoint, transformer, "some/model")
        assert made.file.official is not None
        assert made.file.official.unused == ()
        assert len(made.file.values) == len(checkpoint.solution)
        assert len(made.notes) == (2 if model == SD3 else 1)
        assert "does not say which weights" in made.notes[0]


@pytest.mark.parametrize(
    ("weights", "said"),
    [((6.4, -5.1), "than to the 1 and 0 of the earlier version"), ((1.2, -0.1), "this calibration is WRONG")],
)
def test_two_versions_wrote_the_same_shapes_for_sd3_and_the_weights_speak_for_one(
    weights: tuple[float, float], said: str
) -> None:
    transformer, checkpoint = example(SD3, "gate", 2)
    given = replace(checkpoint, solution=(*checkpoint.solution[:-2], *weights))
    note = from_official(given, transformer, "some/model").notes[1]
    assert f"weights, {weights[0]:g} and {weights[1]:g}, are nearer" in note
    assert said in note


def test_counts_that_nobody_knows_are_told() -> None:
    transformer, checkpoint = example(FLUX, "gate", 1)
    given = replace(checkpoint, shapes={**checkpoint.shapes, "triples": 3}, unknown=("config",))
    made = from_official(given, transformer, "some/model")
    assert "It has triples, config, of which nothing is known" in " ".join(made.notes)


def test_values_beyond_the_bounds_of_the_official_search_are_told() -> None:
    transformer, checkpoint = example(FLUX, "gate", 1)
    assert "beyond the bounds" not in " ".join(from_official(checkpoint, transformer, "some/model").notes)
    odd = replace(checkpoint, solution=(1e308, *checkpoint.solution[1:-1], 11.0))
    assert "2 values, the first of them member0/" in " ".join(from_official(odd, transformer, "some/model").notes)


def test_scales_changed_here_win_over_those_that_were_kept() -> None:
    transformer, checkpoint = example(QWEN, "gate", 2)
    file = from_official(checkpoint, transformer, "some/model").file
    at = file.names.index("member0/transformer_blocks.0.mlp.image")
    changed = replace(file, values=(*file.values[:at], 0.5, *file.values[at + 1 :]))
    back = to_official(changed, transformer)
    order = order_of(transformer, "gate", 2).names
    differing = [n for n, a, b in zip(order, back.checkpoint.solution, checkpoint.solution, strict=True) if a != b]
    assert differing == [file.names[at]]
    assert "1 here are not 1 and will have no effect there" in " ".join(back.notes)


@pytest.mark.parametrize("mode", ["fixed", "raw", "guidance"])
@pytest.mark.parametrize("granularity", ["block", "layer", "gate"])
def test_calibrations_of_runs_here_mean_the_same_there(mode: str, granularity: str) -> None:
    from calibri_lightning.calibration import CalibrationFile

    transformer = official.tiny(SD3).transformer
    layout = build_layout(find_sites(transformer), granularity, "cfg", 4.5, mode)
    values = tuple(official.vector(layout.num_parameters))
    file = CalibrationFile(layout.names, values, granularity, layout.members, mode, fingerprint(transformer))
    made = to_official(file, transformer).checkpoint
    assert made.solution[-2:] == layout.member_weights(file.values)
    again = from_official(made, transformer, "some/model").file
    expected = layout.rows(torch.tensor([values], dtype=torch.float64)).scales
    assert torch.equal(layout_for(again, transformer).rows(torch.tensor([again.values])).scales, expected)


def test_the_command_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = SHAPES["flux1-dev", "gate", 1]
    source, ours, back = (tmp_path / name for name in ("cmaes_step_0400.json", "calibration.json", "back.json"))
    source.write_text(json.dumps(official.document(official.vector(115), shapes)))
    words = ["--model", "flux1-dev", "--granularity", "gate", "--out", str(ours)]
    assert main(["convert", str(source), *words]) == 0
    out = capsys.readouterr().out
    assert "calibration of black-forest-labs/FLUX.1-dev, 115 values, granularity gate, 1 member(s)" in out
    assert "does not say which weights it was found on" in out
    file = read_calibration(ours)
    assert file.model.name == "black-forest-labs/FLUX.1-dev"
    assert file.obtained_by.strategy == "CMA-ES of the official Calibri code"
    assert main(["convert", str(ours), "--out", str(back)]) == 0
    assert json.loads(back.read_text()) == json.loads(source.read_text())
