"""Every mistake of a user ends in one clear message, exit code 2, no traceback, and before long work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_runs import CMA, Capture, TinyRuns, refused

pytestmark = pytest.mark.usefixtures("no_plots")


def edited(runs: TinyRuns, tmp_path: Path, old: str, new: str) -> tuple[str, ...]:
    """A second configuration file over the first, in which a text is replaced."""
    text = runs.config.read_text()
    assert old in text
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(old, new))
    return ("--config", str(path))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("num_steps: 2", "num_stepz: 2", ["model.num_stepz"]),
        ("num_pairs: 2", "num_pears: 2", ["num_pears"]),
        ("class_path: PairES", "class_path: PairEZ", ["model.strategy", "PairEZ", "PairES, CMAES"]),
        ("class_path: SD3", "class_path: SD9", ["model.backbone", "SD9", "built in are SD3"]),
        ("granularity: layer", "granularity: head", ["model.calibration.granularity", "'block', 'layer', 'gate'"]),
        ("num_steps: 2", "num_steps: two", ["model.num_steps", "int", "two"]),
        ("trainer: {", "trainer: {{", ["parsing"]),
    ],
)
def test_configuration(runs: TinyRuns, tmp_path: Path, capsys: Capture, old: str, new: str, words: list[str]) -> None:
    message = refused(runs, capsys, *edited(runs, tmp_path, old, new))
    for word in (*words, "fit --help"):
        assert word in message


def test_test_prompts_that_a_reward_cannot_score_are_refused_before_the_search(runs: TinyRuns, capsys: Capture) -> None:
    flags = ("--model.rewards={shapes: 1.0}", "--data.train=shapes:train", "--data.val=shapes:val")
    message = refused(runs, capsys, *flags, "--data.allow_overlap=true")
    for word in ("reward 'shapes'", "three red circles", "shapes:train"):
        assert word in message


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.nonsense=1", ["--model.nonsense"]),
        ("--config=absent.yaml", ["absent.yaml", "does not exist"]),
        ("--model.num_steps=0", ["num_steps=0", "at least 1"]),
        ("--model.rewards={shapez: 1.0}", ["no reward 'shapez'", "Did you mean 'shapes'"]),
        ("--model.rewards={absent_module:f: 1.0}", ["absent_module:f", "PYTHONPATH"]),
        ("--model.rewards={shapes: .nan}", ["shapes", "finite"]),
        ("--model.rewards={shapes: high}", ["does not take high", "{pickscore: {weight: 1.0, options:"]),
        ("--model.rewards={shapes: {wieght: 1.0}}", ["does not take {'wieght': 1.0}", "{pickscore: 1.0}"]),
        ("--model.rewards={shapes: {options: {size: 2}}}", ["'shapes' has no option 'size'", "it has none"]),
        ("--model.rewards={shapes: 0.0}", ["nothing to optimise"]),
        ("--model.strategy.num_pairs=0", ["num_pairs is 0", "at least 1"]),
        ("--model.strategy.sigma0=-1", ["sigma0", "-1"]),
        ("--model.rows_per_forward=lots", ["rows_per_forward does not take lots", "or auto"]),
        ("--model.rows_per_forward=1", ["rows_per_forward is 1", "2"]),
        ("--model.balance_over=0", ["balance_over is 0", "at least 1"]),
        ("--model.calibration.guidance_scale=30", ["30", "20"]),
        ("--model.calibration.members=0", ["members", "from 1 up"]),
        ("--trainer.precision=bf16-true", ["bf16-true", "theta", "bf16-mixed", "dtype"]),
        ("--trainer.precision=64-true", ["64-true", "32-true"]),
        ("--trainer.devices=none", ["devices", "int > 0"]),
        ("--trainer.gradient_clip_val=1.0", ["gradient_clip_val"]),
        ("--data.train=null", ["no train prompts", "data.train"]),
        ("--data.train=absent.txt", ["absent.txt", "does not exist"]),
        ("--data.val_size=0", ["data.val_size=0"]),
        ("--ckpt_path=absent.ckpt", ["absent.ckpt", "no checkpoint"]),
        ("--model.init_from=absent", ["absent", "calibration.json"]),
        ("--model.backbone.pretrained=absent/", ["absent/"]),
        ("--model.backbone.pretrained=/", ["model_index.json"]),
    ],
)
def test_flags(runs: TinyRuns, capsys: Capture, flag: str, words: list[str]) -> None:
    message = refused(runs, capsys, flag)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["kernel=Foo"], ["strategy.kernel does not take Foo", "built in are FlowSDE, DanceSDE, CPS;"]),
        (["window=Foo"], ["strategy.window does not take Foo", "AllSteps, RandomWindow, SlidingWindow;"]),
        (["kernel=CPS", "kernel.noise_level=2"], ["noise_level of CPS is 2", "at most 1"]),
        (["kernel=FlowSDE", "kernel.noise_level=0"], ["noise_level of FlowSDE is 0", "above 0"]),
        (["kernel.noise_level=0.5"], ["kernel.noise_level is given, but not what", "FlowSDE, DanceSDE, CPS"]),
        (["window=RandomWindow", "window.length=2"], ["strategy.window has no option 'length'"]),
        (["window=RandomWindow", "window.size=two"], ["strategy.window.size does not take 'two'"]),
        (["ema=false"], ["strategy.ema does not take false", "EmaOptions, or null"]),
        (["ema.decay=2"], ["decay is 2.0", "below 1"]),
        (["max_images=many"], ["strategy.max_images does not take many", "int, or null"]),
        (["loss.kl=menn"], ["loss.kl", "'mean', 'velocity', 'none'", "menn"]),
        (["train=lroa"], ["train", "'lora'", "lroa"]),
    ],
)
def test_settings_of_flow_grpo(runs: TinyRuns, capsys: Capture, flags: list[str], words: list[str]) -> None:
    named = [f"--model.strategy.{flag}" for flag in flags]
    message = refused(runs, capsys, "--model.strategy=FlowGRPO", *named)
    for word in words:
        assert word in message


def test_settings_of_a_lora(runs: TinyRuns, capsys: Capture) -> None:
    assert "model.lora has no option 'target'" in refused(runs, capsys, "--model.lora.target=[attn.to_q]")
    assert "lora.rank is 0" in refused(runs, capsys, "--model.lora.rank=0")


@pytest.mark.parametrize("popsize", [1, 3])
def test_popsize(runs: TinyRuns, capsys: Capture, popsize: int) -> None:
    message = refused(runs, capsys, *CMA, f"--model.strategy.popsize={popsize}")
    assert f"popsize is {popsize}" in message
    assert "at least 4" in message


def test_a_search_without_an_end(runs: TinyRuns, capsys: Capture) -> None:
    message = refused(runs, capsys, "--trainer.max_steps=-1", worked=True)
    assert "trainer.max_steps" in message
    assert "max_images" in message


def test_a_share_of_the_endless_epoch_between_validations(runs: TinyRuns, capsys: Capture) -> None:
    assert "whole number" in refused(runs, capsys, "--trainer.val_check_interval=1.0")


def test_no_generation_at_all(runs: TinyRuns, capsys: Capture) -> None:
    assert "max_steps is 0" in refused(runs, capsys, "--trainer.max_steps=0")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no prompts"]),
        (b"\n\n", ["no prompts"]),
        (b"a red circle\n\na blue circle\n", ["blank", "line 2"]),
        (b"a red circle\na blue circle\na red circle\n", ["line", "3", "duplicates"]),
        (b"a caf\xe9\n", ["UTF-8"]),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_prompts_file(
    runs: TinyRuns, tmp_path: Path, capsys: Capture, part: str, content: bytes, words: list[str]
) -> None:
    """The test prompts too are read before the search, not after hours of it."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    message = refused(runs, capsys, f"--data.{part}={path}")
    for word in (str(path), *words):
        assert word in message


def test_prompts_shared_by_train_and_test(runs: TinyRuns, capsys: Capture) -> None:
    message = refused(runs, capsys, f"--data.test={runs.config.parent / 'train.txt'}")
    assert "a red circle" in message
    assert "held out" in message


def test_prediction_without_prompts(runs: TinyRuns, capsys: Capture) -> None:
    assert "data.predict_prompts" in refused(runs, capsys, command="predict")


@pytest.mark.parametrize(
    ("command", "part"), [("fit", "train"), ("fit", "test"), ("test", "test"), ("predict", "predict")]
)
def test_negative_prompts_that_no_member_sees(
    runs: TinyRuns, tmp_path: Path, capsys: Capture, command: str, part: str
) -> None:
    """They would be ignored in silence; guidance-distilled models have no pass for them."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a pink circle"}\n{"prompt": "a pink square", "negative": "blurry"}\n')
    single = ("--model.calibration.members=single", "--model.calibration.weight_mode=fixed", f"--data.{part}={path}")
    message = refused(runs, capsys, *single, command=command)
    for word in (f"data.{part} has 1 negative prompts", "'blurry'", "'a pink square'", "members: cfg", "remove"):
        assert word in message


@pytest.mark.parametrize(
    ("backbone", "side", "size", "nearest"),
    [("SD3", "height", 30, 16), ("SD3", "width", 0, 8), ("SD3", "width", 9000, 16), ("Stock", "height", 30, 32)],
)
def test_sizes_that_the_autoencoder_cannot_take(
    runs: TinyRuns, capsys: Capture, backbone: str, side: str, size: int, nearest: int
) -> None:
    message = refused(runs, capsys, *_backbone(runs, backbone, f"--model.backbone.{side}={size}"))
    assert f"{side} is {size}; this model makes pictures whose sides are multiples of" in message
    assert message.endswith(f"Set {side} to {nearest}.")


@pytest.mark.parametrize("backbone", ["SD3", "Stock"])
def test_a_model_without_a_flow_matching_scheduler(
    runs: TinyRuns, tmp_path: Path, capsys: Capture, backbone: str
) -> None:
    from diffusers import DDIMScheduler

    shutil.copytree(runs.config.parent / "model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "scheduler")
    DDIMScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("FlowMatchEulerDiscreteScheduler", "DDIMScheduler"))
    message = refused(runs, capsys, *_backbone(runs, backbone, f"--model.backbone.pretrained={tmp_path / 'model'}"))
    assert "scheduler is DDIMScheduler" in message
    assert "FlowMatchEulerDiscreteScheduler" in message


def _backbone(runs: TinyRuns, name: str, *flags: str) -> tuple[str, ...]:
    """Flags for another backbone of the same model."""
    if name == "SD3":
        return flags
    folder = runs.config.parent / "model"
    own = ("--model.backbone=Stock", f"--model.backbone.pretrained={folder}", "--model.backbone.dtype=float32")
    return (*own, *flags, "--model.calibration.weight_mode=fixed")


@pytest.mark.parametrize("component", ["vae", "text_encoder_2", "tokenizer", "scheduler"])
def test_model_folder_without_a_component(
    runs: TinyRuns, tiny_folder: Path, tmp_path: Path, capsys: Capture, component: str
) -> None:
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / component)
    message = refused(runs, capsys, f"--model.backbone.pretrained={tmp_path / 'model'}")
    assert f"lacks its component {component!r}" in message


def test_unknown_block_class(runs: TinyRuns, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_sd3

    novel = type("NovelBlock", (transformer_sd3.JointTransformerBlock,), {})
    monkeypatch.setattr(transformer_sd3, "JointTransformerBlock", novel)
    message = refused(runs, capsys)
    assert "NovelBlock" in message


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("raises", ["tiny_rewards:raises", "RuntimeError", "server is down"]),
        ("one_too_many", ["tiny_rewards:one_too_many", "[4]", "[3]"]),
        ("not_a_tensor", ["tiny_rewards:not_a_tensor", "list"]),
        ("always_nan", ["finite reward"]),
    ],
)
def test_reward(runs: TinyRuns, capsys: Capture, reward: str, words: list[str]) -> None:
    message = refused(runs, capsys, f'--model.rewards={{"tiny_rewards:{reward}": 1.0}}', worked=True)
    for word in words:
        assert word in message
