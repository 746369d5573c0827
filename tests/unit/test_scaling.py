"""The simulation counts what a run does and sends; real processes share a generation; the page is what is computed."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import ROOT
from PIL import Image
from torch.distributed import distributed_c10d

from calibri_lightning.__main__ import main
from calibri_lightning.bench import processes, simulation
from calibri_lightning.bench.measure import Spread
from calibri_lightning.bench.models import RANDOM_MODELS
from calibri_lightning.bench.options import parse
from calibri_lightning.bench.prediction import Assumptions, PictureCost, count_picture, predict
from calibri_lightning.bench.processes import measure_processes
from calibri_lightning.bench.random_models import build_random
from calibri_lightning.bench.roofline import flops_per_row
from calibri_lightning.bench.simulation import SIZE_BYTES, Cost, Work, simulate
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.grid import Grid
from calibri_lightning.sampling.sharing import Request, idle_share, loads, unit_sizes

WORK = Work(popsize=17, bucket=16, pictures_per_unit=128)
EVEN = Cost(unit_seconds=0, jitter=0, latency=0)
"""Nothing but pictures takes time."""
RANKS = (1, 2, 3, 8, 64, 500)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("over", [1, 8, 24])
def test_loads_are_those_of_units_and_idle_is_what_is_left(ranks: int, over: int) -> None:
    found = simulate(WORK, EVEN, ranks, over)
    sizes = unit_sizes(272, 128, over)
    assert found.num_units == len(sizes)
    assert found.loads == loads(sizes, ranks)
    assert sum(found.loads) == WORK.num_pictures == 272
    assert found.idle_share == pytest.approx(idle_share([Request(272, 128, over)], ranks), abs=1e-12)
    travel = (found.sent_bytes + found.received_bytes) / EVEN.bandwidth
    assert found.seconds == pytest.approx(found.busiest * EVEN.picture_seconds + travel)


@pytest.mark.parametrize("ranks", [2, 8, 16, 34, 272])
def test_idle_share_where_units_are_a_multiple_of_the_ranks(ranks: int) -> None:
    found = simulate(WORK, EVEN, ranks, ranks)
    assert found.idle_share == pytest.approx(1 - 272 / (ranks * -(-272 // ranks)), abs=1e-12)


def test_one_rank_waits_for_nobody_and_sends_nothing() -> None:
    found = simulate(WORK, Cost(), 1, 1)
    assert (found.idle_share, found.sent_bytes, found.received_bytes, found.num_collectives) == (0, 0, 0, 0)


def pickled(value: object) -> int:
    """Bytes that torch itself sends for an object: its pickle, and before that its length."""
    tensor, size = distributed_c10d._object_to_tensor(value, torch.device("cpu"), distributed_c10d._get_default_group)
    return len(tensor) + size.nbytes


@pytest.mark.parametrize("num_rewards", [1, 3])
def test_bytes_are_those_of_the_packed_grids_and_the_pickled_objects(
    num_rewards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []
    broadcast = simulation._Wire.broadcast
    monkeypatch.setattr(simulation._Wire, "broadcast", lambda self, one: sent.append(one) or broadcast(self, one))
    ranks, work = 5, replace(WORK, num_rewards=num_rewards)
    found = simulate(work, Cost(), ranks, 5)
    names = [f"reward {i}" for i in range(num_rewards)]
    grid = 8 * len(Grid.empty(names, (17, 16)).pack())
    assert grid == 8 * (5 + (1 + num_rewards) * 272)
    assert found.received_bytes == (ranks - 1) * grid
    # The task, two decisions (what to do, and that all is done), and the status.
    assert len(sent) == 4
    assert found.num_collectives == len(sent) + 1
    assert found.sent_bytes == (ranks - 1) * (grid + sum(map(pickled, sent)))
    assert torch.tensor(0).nbytes == SIZE_BYTES


def test_a_slow_rank_is_waited_for_and_noise_has_a_seed() -> None:
    even, slow = (simulate(WORK, replace(EVEN, slowdown=factor), 8, 8) for factor in (1.0, 1.5))
    assert slow.idle_share == pytest.approx(1 - (7 + 1.5) / (8 * 1.5))
    assert slow.seconds - even.seconds == pytest.approx(0.5 * 34)
    noisy = [simulate(WORK, replace(EVEN, jitter=0.1, seed=seed), 8, 8).seconds for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]
    assert noisy[0] > even.seconds


def test_collectives_take_hops() -> None:
    found = simulate(WORK, replace(EVEN, latency=1.0, bandwidth=float("inf")), 9, 9)
    assert found.seconds == pytest.approx(found.busiest + found.num_collectives * 4)


def test_a_prediction_is_the_formula() -> None:
    picture = PictureCost(row_flops=2e12, num_rows=30, decoding_flops=1e12)
    rates = {"peak_flops": 1e14, "transformer_share": 0.5, "decoder_share": 0.1, "reward_seconds": 0.25}
    assumed = Assumptions(**rates, rows_per_forward=8, cost=EVEN)
    assert picture.seconds(assumed) == pytest.approx(60 / 50 + 1 / 10 + 0.25)
    found = predict(picture, WORK, 2, assumed, 8, 8)
    assert found.num_units == 72, "272 pictures, at most 4 a unit: 68 units, and the next multiple of 8"
    travel = (found.sent_bytes + found.received_bytes) / EVEN.bandwidth
    assert found.seconds == pytest.approx(34 * 1.55 + travel)


def test_arithmetic_without_numbers_is_that_of_the_model() -> None:
    """What a sketch on the meta device counts is what the model itself does."""
    made = [build_random(RANDOM_MODELS["sd3.5-medium"], "float32", torch.device(d), 1, 64) for d in ("meta", "cpu")]
    sketch, real = (count_picture(one, 2, 5) for one in made)
    assert sketch == real
    assert sketch.row_flops == flops_per_row(made[1])
    assert sketch.num_rows == 10


def test_real_processes_draw_what_the_simulation_says(capfd: pytest.CaptureFixture[str]) -> None:
    """Of their own units, and all of them get the same rewards: otherwise this is refused."""
    words = ["--scaling", "--popsize", "5", "--bucket", "3", "--steps", "1", "--rows", "8", "--repeats", "1"]
    options = parse([*words, "--processes", "1", "2"])
    one, two = measure_processes(options, (1, 2))
    for found in (one, two):
        planned = simulate(Work(5, 3, pictures_per_unit=4), Cost(), found.world_size, 2)
        assert found.loads == planned.loads
        assert found.images_per_second == 15 / found.timing.median
    assert one.loads == (15,)
    assert two.loads == (8, 7), "4 units of 4, 4, 4 and 3"
    assert (one.speedup.median, one.idle_share.median) == (1, 0)
    assert 0 <= two.idle_share.median < 1
    assert len(two.core_shares) == len(two.timing.seconds) == 1
    assert (two.quiet_speedup is None) == (two.num_quiet == 0)


def test_only_undisturbed_repetitions_count_as_such() -> None:
    def one(world_size: int, rank: int, seconds: float, cpu: float) -> processes._Pass:
        return processes._Pass(world_size, rank, seconds, seconds, cpu, 4 // world_size, "same")

    alone = [one(1, 0, seconds, cpu) for seconds, cpu in ((4.0, 4.0), (6.0, 4.0), (4.2, 4.2))]
    both = [one(2, rank, seconds, cpu) for seconds, cpu in ((2.0, 2.0), (2.0, 2.0), (3.0, 1.9)) for rank in (0, 1)]
    first, second = processes._summarised([*alone, *both], (1, 2), 4)
    assert (second.num_quiet, second.quiet_speedup) == (1, Spread(2.0, 2.0, 2.0)), "the first repetition"
    assert first.num_quiet == 2
    assert second.speedup.median == 2.0
    assert second.cpu_speedup == Spread.of([4.0 / 2.0, 4.0 / 2.0, 4.2 / 1.9])
    assert second.idle_share.median == 0
    with pytest.raises(UserError, match="depend on the number of processes"):
        processes._summarised([*alone, replace(both[0], rewards="other")], (1, 2), 4)


def test_command_prints_tables_and_writes_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scaling.json"
    assert main(["bench", "--scaling", "--processes", "--ranks", "64", "1", "8", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [point["world_size"] for point in report["simulated"]["each"]] == [1, 8, 64]
    assert [point["balance_over"] for point in report["simulated"]["24"]] == [24, 24, 24]
    assert report["simulated"]["each"][1]["busiest"] == 34
    assert report["processes"] == []
    assert Image.open(out.with_suffix(".png")).size == (1260, 525)
    printed = capsys.readouterr().out
    for words in ("17 candidates x 16 prompts = 272 pictures", "from rank 0", "idle, 24", "load average"):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "4"], ["--ranks is for --scaling"]),
        (["--seed", "4"], ["--seed is for --scaling"]),
        (["--scaling", "--ranks", "0"], ["--ranks is 0", "at least 1"]),
        (["--scaling", "--processes", "2", "-1"], ["--processes is 2 -1", "at least 1"]),
        (["--scaling", "--jitter", "-1"], ["--jitter is -1", "positive"]),
        (["--scaling", "--picture-seconds", "0"], ["--picture-seconds is 0", "positive"]),
        (["--scaling", "--slowdown", "0.5"], ["--slowdown is 0.5", "at least 1"]),
        (["--scaling", "--train"], ["--train and --scaling"]),
        (["--scaling", "--compile"], ["--compile", "--scaling leaves out"]),
        (["--scaling", "--threads", "2"], ["--threads is 2", "gives each process one"]),
        (["--scaling", "--precision", "bfloat16"], ["--scaling runs in float32"]),
    ],
)
def test_bad_options_are_refused_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert all(word in error for word in words), error


def test_tables_of_the_page_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("build_scaling", ROOT / "docs" / "build_scaling.py")
    assert spec is not None
    assert spec.loader is not None
    builder: Any = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "build_scaling", builder)
    spec.loader.exec_module(builder)
    page = builder.PAGE.read_text(encoding="utf-8")
    assert builder.build(page) == page, "run: python docs/build_scaling.py"
