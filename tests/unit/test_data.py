from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer

from calibri_lightning.data import PromptData
from calibri_lightning.errors import UserError
from calibri_lightning.loaders import PromptChunks, PromptTicker
from calibri_lightning.prompts import Prompt, PromptBatch, draw_prompts

TRAIN = tuple(Prompt(f"train {i}", i) for i in range(7))


class Recorder(LightningModule):
    """Steps like a strategy does, writes down its batches, and can be killed in the middle of a step."""

    def __init__(self, prompts_per_step: int = 3, killed_in: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.strategy = SimpleNamespace(prompts_per_step=prompts_per_step)
        self.killed_in = killed_in
        self.seen: list[PromptBatch] = []
        self.evaluated: list[PromptBatch] = []

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        if batch.step == self.killed_in:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "killed.ckpt")
            raise KeyboardInterrupt
        self.seen.append(batch)
        optimizer: Any = self.optimizers()
        optimizer.step()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.evaluated.append(batch)

    test_step = validation_step

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.evaluated.append(batch)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    sources = {}
    for part, number in (("train", 7), ("val", 5), ("test", 4)):
        path = tmp_path / f"{part}.txt"
        path.write_text("".join(f"{part} {i}\n" for i in range(number)))
        sources[part] = str(path)
    return sources


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults = {"max_steps": 11, "check_val_every_n_epoch": None, "use_distributed_sampler": False}
    return quiet_trainer(folder, *callbacks, **(defaults | options))


def steps(batches: list[PromptBatch]) -> list[int]:
    return [batch.step for batch in batches]


def expected(seed: int, count: int, first: int, last: int) -> list[PromptBatch]:
    return [PromptBatch(step, draw_prompts(TRAIN, seed, step, count)) for step in range(first, last)]


@pytest.mark.usefixtures("untouched_rng")
def test_a_step_of_fit_sees_the_prompts_of_that_step(tmp_path: Path, files: dict[str, str]) -> None:
    module = Recorder(prompts_per_step=3)
    run = trainer(tmp_path)
    run.fit(module, datamodule=PromptData(**files, seed=4))
    assert run.global_step == 11
    assert module.seen == expected(4, 3, 0, 11)


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}, {"val_check_interval": 3}])
def test_epochs_of_lightning_and_validation_do_not_disturb_the_sequence(
    tmp_path: Path, files: dict[str, str], options: dict[str, int]
) -> None:
    module = Recorder()
    trainer(tmp_path, **options).fit(module, datamodule=PromptData(**files))
    assert module.seen == expected(0, 3, 0, 11)


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}, {"val_check_interval": 3}])
@pytest.mark.parametrize("at", [1, 4, 6, 8])
def test_a_resumed_run_continues_with_the_next_step(
    tmp_path: Path, files: dict[str, str], at: int, options: dict[str, int]
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, saver, **options).fit(Recorder(), datamodule=PromptData(**files))
    resumed = Recorder()
    trainer(tmp_path, **options).fit(
        resumed, datamodule=PromptData(**files), ckpt_path=tmp_path / f"step={at}.ckpt", weights_only=True
    )
    assert resumed.seen == expected(0, 3, at, 11)


def test_a_run_resumed_twice_continues_with_the_next_step(tmp_path: Path, files: dict[str, str]) -> None:
    seen = []
    for leg, last in enumerate((3, 4, 9)):
        module = Recorder()
        saver = ModelCheckpoint(tmp_path, filename=f"leg{leg}", every_n_train_steps=1)
        trainer(tmp_path, saver, max_steps=last).fit(
            module,
            datamodule=PromptData(**files),
            ckpt_path=tmp_path / f"leg{leg - 1}.ckpt" if leg else None,
            weights_only=True,
        )
        seen += module.seen
    assert seen == expected(0, 3, 0, 9)


def test_a_step_that_was_interrupted_is_done_again(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path).fit(Recorder(killed_in=5), datamodule=PromptData(**files))
    resumed = Recorder()
    trainer(tmp_path).fit(
        resumed, datamodule=PromptData(**files), ckpt_path=tmp_path / "killed.ckpt", weights_only=True
    )
    assert resumed.seen == expected(0, 3, 5, 11)


@pytest.mark.parametrize("change", ["prompts", "seed", "prompts_per_step"])
def test_a_resume_with_other_prompts_is_refused(tmp_path: Path, files: dict[str, str], change: str) -> None:
    trainer(tmp_path, ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1), max_steps=2).fit(
        Recorder(), datamodule=PromptData(**files)
    )
    if change == "prompts":
        Path(files["train"]).write_text("something else\n")
    data = PromptData(**files, seed=int(change == "seed"))
    module = Recorder(prompts_per_step=4 if change == "prompts_per_step" else 3)
    with pytest.raises(UserError, match=rf"the checkpoint was made with {change}.*model\.init_from"):
        trainer(tmp_path).fit(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_evaluation_sees_every_prompt_once_in_order(tmp_path: Path, files: dict[str, str], size: int) -> None:
    data = PromptData(**files, predict=files["test"], eval_batch_size=size)
    for run, step, part in (("validate", -1, "val"), ("test", -2, "test"), ("predict", -3, "test")):
        module = Recorder()
        getattr(trainer(tmp_path), run)(module, datamodule=data)
        assert set(steps(module.evaluated)) == {step}
        number = {"val": 5, "test": 4}[part]
        assert [p for batch in module.evaluated for p in batch.prompts] == [
            Prompt(f"{part} {i}", i) for i in range(number)
        ]
        assert all(len(batch.prompts) == size for batch in module.evaluated[:-1])


def test_sizes_take_the_first(tmp_path: Path, files: dict[str, str]) -> None:
    data = PromptData(**files, val_size=3, test_size=100)
    data.setup("fit")
    assert [p.index for p in data.prompts("val")] == [0, 1, 2]
    assert len(data.prompts("test")) == 4


def test_written_out_prompts_are_predicted_and_may_repeat(tmp_path: Path) -> None:
    module = Recorder()
    trainer(tmp_path).predict(module, datamodule=PromptData(predict_prompts=["a", "b", "a"]))
    assert module.evaluated == [PromptBatch(-3, (Prompt("a", 0), Prompt("b", 1), Prompt("a", 2)))]


def test_fit_runs_without_validation_prompts(tmp_path: Path, files: dict[str, str]) -> None:
    module = Recorder()
    trainer(tmp_path, val_check_interval=2).fit(module, datamodule=PromptData(train=files["train"]))
    assert steps(module.seen) == list(range(11))
    assert module.evaluated == []


@pytest.mark.parametrize("stage", ["fit", "test", "predict", "validate"])
def test_a_stage_without_its_prompts_is_refused_before_it_starts(stage: str) -> None:
    part = {"fit": "train", "validate": "val"}.get(stage, stage)
    with pytest.raises(UserError, match=rf"there are no {part} prompts: name their source with data\.{part}"):
        PromptData().setup(stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_batch_size": 0}, r"data\.eval_batch_size=0: must be at least 1"),
        ({"val_size": 0}, r"data\.val_size=0"),
        ({"test_size": -1}, r"data\.test_size=-1"),
        ({"seed": -1}, r"data\.seed=-1"),
        ({"val": "none.txt"}, "does not exist"),
        ({"val": "shapes:none"}, "shapes:train"),
        ({"train": "prompts.yaml"}, "suffix"),
        ({"predict_prompts": ["a", " "]}, "holds a blank prompt"),
        ({"predict": "shapes:val", "predict_prompts": ["a"]}, "give one of them"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptData(**options)


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
def test_shared_prompts_are_refused_with_their_lines(files: dict[str, str], pair: tuple[str, str]) -> None:
    first, second = pair
    with open(files[second], "a") as file:
        file.write(f"{first} 2\n")
    line = {"val": 6, "test": 5}[second]
    with pytest.raises(UserError, match=rf"share 1 prompts: '{first} 2' \(line 3 and line {line}\)"):
        PromptData(**files).setup("fit")
    PromptData(**files, allow_overlap=True).setup("fit")


def test_a_bad_test_file_is_found_before_training(tmp_path: Path, files: dict[str, str]) -> None:
    Path(files["test"]).write_text("one\n\ntwo\n")
    module = Recorder()
    with pytest.raises(UserError, match=r"test\.txt' has blank prompts \(line 2\)"):
        trainer(tmp_path).fit(module, datamodule=PromptData(**files))
    assert module.seen == []


def test_duplicates_reach_the_reader(files: dict[str, str]) -> None:
    Path(files["val"]).write_text("one\none\ntwo\n")
    with pytest.raises(UserError, match="repeats prompts"):
        PromptData(**files).setup("validate")
    data = PromptData(**files, duplicates="keep")
    data.setup("validate")
    assert [(p.text, p.index) for p in data.prompts("val")] == [("one", 0), ("one", 1), ("two", 2)]


def test_a_ticker_continues_after_the_last_finished_step() -> None:
    running = False
    ticker = PromptTicker(TRAIN, 0, 3, in_flight=lambda: running)

    def take(iterator: Iterator[PromptBatch], number: int) -> list[PromptBatch]:
        return [next(iterator) for _ in range(number)]

    ahead = take(iter(ticker), 5)
    assert ticker.state_dict()["num_finished"] == 0  # looking ahead finishes nothing
    ticker.begin(ahead[2].step)
    assert ticker.state_dict()["num_finished"] == 3
    running = True
    state = ticker.state_dict()
    assert state["num_finished"] == 2
    restored = PromptTicker(TRAIN, 0, 3)
    restored.load_state_dict(state)
    assert take(iter(restored), 3) == ahead[2:]


def test_chunks_can_be_read_again() -> None:
    chunks = PromptChunks(TRAIN, -1, 3)
    assert [len(batch.prompts) for batch in chunks] == [3, 3, 1]
    assert list(chunks) == list(chunks)
    assert len(chunks) == 3
