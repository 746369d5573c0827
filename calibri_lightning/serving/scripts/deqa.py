# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "transformers==4.36.1",  # what the model's authors name
#   "accelerate==0.25.0",
#   "huggingface-hub==0.20.3",
#   "einops==0.7.0",
#   "icecream==2.1.3",
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
"""Serves DeQA-Score: how good is this picture, from 1 to 5? Run with `uv run deqa.py --revision COMMIT --port 8102`.

You et al., arXiv 2501.11561. The model is read from the Hub together with code that lies there and is executed. So the
commit has to be given: read the code of huggingface.co/zhiyuanyou/DeQA-Score-Mix3 at a commit, then name that commit.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

if not __package__:
    importlib.import_module("_package")

from numpy.typing import NDArray

from calibri_lightning.serving.protocol import PromptText, RewardInfo
from calibri_lightning.serving.scorer import Scorer
from calibri_lightning.serving.scripts.shared import add_model_options, batches, commit, to_pillow

_REPOSITORY = "zhiyuanyou/DeQA-Score-Mix3"


class DeQAScorer(Scorer):
    """DeQA-Score, which judges technical quality."""

    def __init__(self, device: str, revision: str, batch_size: int = 8, pretrained: str = _REPOSITORY) -> None:
        """Loads nothing yet.

        Args:
            device: Where the model runs.
            revision: Commit on the Hub.
            batch_size: Pictures of one forward.
            pretrained: Hub id, or a folder with a copy of it.
        """
        self.device, self._batch_size, self._pretrained, self._revision = device, batch_size, pretrained, revision
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
            attn_implementation="eager",
            torch_dtype=torch.float16,
            device_map=self.device,
        ).eval()
        return RewardInfo(
            name="deqa",
            model=self._pretrained,
            revision=self._revision,
            preprocessing="deqa: RGB, 8 bits, padded to a square, 448 pixels",
            pixels="uint8",
        )

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        """Scores pictures.

        Args:
            images: B pictures.
            prompts: Unused.

        Returns:
            1 to 5 for each; Flow-GRPO's server divides this by 5.
        """
        import torch

        pictures = to_pillow(images)
        scores: list[float] = []
        with torch.inference_mode():
            for part in batches(len(pictures), self._batch_size):
                scores += self._model.score(pictures[part]).float().tolist()
        return {"deqa": scores}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this model.

    Args:
        parser: The command line's parser.
    """
    add_model_options(parser, batch_size=8)
    parser.add_argument("--pretrained", default=_REPOSITORY, help="Hub id or folder of the model")
    parser.add_argument(
        "--revision", type=commit, required=True, help="commit on the Hub, 40 digits; its code is executed: read it"
    )


def make(options: argparse.Namespace) -> Scorer:
    """Makes the scorer that the command line asks for.

    Args:
        options: What was given.

    Returns:
        The scorer.
    """
    return DeQAScorer(options.device, options.revision, options.batch_size, options.pretrained)


if __name__ == "__main__":
    from calibri_lightning.serving.run import script_main

    script_main(make, add_options)
