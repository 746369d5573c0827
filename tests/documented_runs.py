"""What the documented commands need, a folder that looks like a clone with finished runs, and how budgets are cut."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from config_files import TURNS, has_gradients, shrunk, takes_turns, write_prompts
from documents import ROOT, Shell, blocks
from released_folders import write_folder

QUICKSTART = "configs/quickstart.yaml"
SLICED = "sliced"
"""Folder of models with the released sizes, but three transformer blocks."""
NUM_BLOCKS = 3
SMALL_TEST = (
    *("--model.full_num_steps=1", "--model.num_grid_prompts=1", "--model.num_diversity_prompts=1"),
    *("--data.val_size=2", "--data.test_size=2", "--trainer.max_steps=1", "--trainer.val_check_interval=1"),
)
REDUCTIONS = {
    "predict": ("--model.num_steps=1",),
    "ablate": ("--num_prompts", "1", "--model.num_steps=1"),
    "sweep": ("--num_prompts", "1", "--steps", "1", "2"),
    "compare": (
        *("--limit", "2", "--steps", "1", "2", "--rewards", "jpeg_compressibility", "--device", "cpu", "--rows", "16"),
        *("--samples", "1", "--diversity-prompts", "1", "--pictures", "1"),
    ),
    "export": (),
    "convert": (),
}
"""Appended to the documented options, of which the last one counts: fewer prompts, steps and conditions, a reward that
needs no download."""
UNLESS_GIVEN = {"ablate": {"--levels": "0", "--out": "study"}, "sweep": {"--out": "study"}}
"""Appended where the documented command does not say it: studies that are not named have a folder of their own, since
one goes on in the folder of another."""
SAME_RUN = ("RUN", "runs/cma/version_0", "runs/grpo/version_0", "runs/stacked/version_0", "runs/name/version_0")
"""Runs that pages speak of: all of them the quickstart's."""
OUTPUTS = {"compare": "comparison"}
"""Default of --out."""


def prepare(folder: Path) -> None:
    """Makes the folder."""
    for name in ("configs", "calibri_lightning", "constraints.txt", "docs"):
        (folder / name).symlink_to(ROOT / name)
    write_prompts(folder)
    shutil.copy(ROOT / QUICKSTART, folder / "my.yaml")
    (folder / "reported.yaml").write_text(said("docs/reproducing.md", "yaml", "held_out"))
    (folder / "my_rewards.py").write_text(said("docs/rewards.md", "python", "def warmth"))
    shapes = {"total": 115, "n_models": 1, "doubles_main": 38, "doubles_ctx": 38, "singles": 38}
    shapes |= {"n_double": 19, "n_single": 38}
    checkpoint = {"solution": [1 + i / 1000 for i in range(115)], "shapes": shapes, "step": 400}
    checkpoint |= {"train_best": 1.0, "train_mean": 0.5, "val": None, "sigma": 0.2, "timestamp": 0.0}
    (folder / "cmaes_step_0400.json").write_text(json.dumps(checkpoint))
    for name in SAME_RUN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / "runs" / "quickstart" / "version_0")


def said(page: str, language: str, words: str) -> str:
    """The one block of a page that holds these words."""
    [text] = [block.text for block in blocks(ROOT / page) if block.language == language and words in block.text]
    return text


def configs(words: Sequence[str]) -> list[str]:
    """The configuration files that a command names."""
    return [words[at + 1] for at, word in enumerate(words) if word == "--config"]


def is_small(words: Sequence[str]) -> bool:
    """Whether a command is run: it is of the shipped model, and in this process."""
    return "--trainer.devices" not in words and all(
        file == QUICKSTART or file.startswith("configs/shapes/") for file in configs(words)
    )


def reduced_fit(words: Sequence[str]) -> list[str]:
    """A documented fit of the shipped model, made small enough for a test; all else is as documented."""
    file = ROOT / configs(words)[0]
    if takes_turns(file):
        return [*words, *SMALL_TEST, "--model.num_steps=5", TURNS]
    if has_gradients(file):
        return [*words, *SMALL_TEST, "--model.num_steps=5", *shrunk(file)]
    pairs = ("--model.strategy.num_pairs=1", "--model.strategy.prompts_per_pair=2")
    population = ("--model.strategy.popsize=4", "--model.strategy.bucket_size=2")
    return [*words, *SMALL_TEST, "--model.num_steps=2", *(pairs if file == ROOT / QUICKSTART else population)]


def reduced(words: Sequence[str]) -> list[str]:
    """A documented command on the shipped model or a run of it, with less to do."""
    if words[0] == "fit":
        return reduced_fit(words)
    others = [word for pair in UNLESS_GIVEN.get(words[0], {}).items() if pair[0] not in words for word in pair]
    return [*words, *REDUCTIONS[words[0]], *others]


def clear_output(words: Sequence[str]) -> None:
    """Removes what an earlier command of the documentation left where this one writes: outputs must be new."""
    named = [word for option, word in zip(words, words[1:], strict=False) if option == "--out"]
    out = Path(named[-1] if named else OUTPUTS.get(words[0], "no output"))
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def planned(words: Sequence[str]) -> list[str]:
    """A documented plan, on the released sizes but for the number of blocks."""
    file = configs(words)[0]
    if not (found := re.match(r"configs/(flux1_dev|sd35_medium|qwen_image)/", file)):
        return list(words)
    folder = Path(SLICED) / found[1]
    if not folder.is_dir():
        write_folder(found[1], folder, NUM_BLOCKS)
    return [*words, f"--model.backbone.pretrained={folder}"]


def program(shell: Shell) -> str:
    """What a command starts: the program, or the command of ours."""
    words = shell.words
    if words[:3] == ("python", "-m", "calibri_lightning"):
        return words[3]
    if words[0] in ("torchrun", "srun"):
        return "launcher"
    return " ".join(words[:3]) if words[:2] == ("python", "-m") else words[0]
