# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "transformers==4.36.1",  # the model's own code runs on 4.36 and 4.37 only
#   "accelerate==0.25.0",
#   "huggingface-hub==0.20.3",
#   "einops==0.7.0",
#   "icecream==2.1.3",  # the model's own code imports it
#   "sentencepiece==0.1.99",
#   "protobuf==4.25.3",
#   "numpy==1.26.4",
#   "pillow==11.0.0",
#   "torch==2.1.2",
#   "torchvision==0.16.2",
#   "fastapi==0.165.0",
#   "prometheus-client==0.26.0",
#   "pydantic==2.14.3",
#   "uvicorn==0.54.0",
# ]
# ///
"""Serves Q-Align: how good is this picture, from 1 (bad) to 5 (excellent)? Run with `uv run q_align.py --port 8101`.

Wu et al., arXiv 2312.17090. The model is read from the Hub together with code that lies there and is executed. So the
commit is part of this file; another one is code that nobody here has seen.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

if not __package__:
    importlib.import_module("_package")

from numpy.typing import NDArray

from calibri_lightning.serving.protocol import PromptText, RewardInfo
from calibri_lightning.serving.scorer import Scorer
from calibri_lightning.serving.scripts.shared import add_model_options, batches, commit, to_pillow

_REPOSITORY = "q-future/one-align"
_COMMIT = (
    "dcc603b95aa0ebd82afa696d4a1e20d11fc80ddb"  # of 2024-05-14, the last one before that of weights as safetensors
)

Task = Literal["quality", "aesthetics"]
"""What is judged; the name of the other one is reported beside it."""


class QAlignScorer(Scorer):
    """OneAlign, which judges quality and aesthetics."""

    def __init__(
        self,
        device: str,
        batch_size: int = 8,
        task: Task = "quality",
        both: bool = False,
        pretrained: str = _REPOSITORY,
        revision: str = _COMMIT,
    ) -> None:
        """Loads nothing yet.

        Args:
            device: Where the model runs.
            batch_size: Pictures of one forward.
            task: What the score is of.
            both: Whether the other task is reported, at twice the time.
            pretrained: Hub id, or a folder with a copy of it.
            revision: Commit on the Hub.
        """
        self.device, self._batch_size, self._pretrained, self._revision = device, batch_size, pretrained, revision
        others: dict[Task, Task] = {"quality": "aesthetics", "aesthetics": "quality"}
        self._tasks: dict[str, Task] = {"q_align": task}
        if both:
            self._tasks[f"q_align_{others[task]}"] = others[task]
        self._model: Any = None

    def load(self) -> RewardInfo:
        """Loads the model.

        Returns:
            What scores.
        """
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            self._pretrained,
            revision=self._revision,
            code_revision=self._revision,
            trust_remote_code=True,
            torch_dtype=torch.float16,
            device_map=self.device,
        ).eval()
        return RewardInfo(
            name="q_align",
            model=self._pretrained,
            revision=self._revision,
            preprocessing=f"q_align, {self._tasks['q_align']}: RGB, 8 bits, padded to a square, 448 pixels",
            pixels="uint8",
            extra_names=[name for name in self._tasks if name != "q_align"],
        )

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        """Scores pictures.

        Args:
            images: B pictures.
            prompts: Unused.

        Returns:
            1 to 5 for each.
        """
        import torch

        pictures = to_pillow(images)
        scores: dict[str, list[float]] = {name: [] for name in self._tasks}
        with torch.inference_mode():
            for part in batches(len(pictures), self._batch_size):
                for name, task in self._tasks.items():
                    answer = self._model.score(pictures[part], task_=task, input_="image")
                    scores[name] += answer.float().tolist()
        return scores


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this model.

    Args:
        parser: The command line's parser.
    """
    add_model_options(parser, batch_size=8)
    parser.add_argument("--task", choices=("quality", "aesthetics"), default="quality", help="what is scored")
    parser.add_argument("--both", action="store_true", help="report the other task beside it, at twice the time")
    parser.add_argument("--pretrained", default=_REPOSITORY, help="Hub id or folder of the model")
    parser.add_argument(
        "--revision", type=commit, default=_COMMIT, help="commit on the Hub, 40 digits; its code is executed"
    )


def make(options: argparse.Namespace) -> Scorer:
    """Makes the scorer that the command line asks for.

    Args:
        options: What was given.

    Returns:
        The scorer.
    """
    return QAlignScorer(
        options.device, options.batch_size, options.task, options.both, options.pretrained, options.revision
    )


if __name__ == "__main__":
    from calibri_lightning.serving.run import script_main

    script_main(make, add_options)
