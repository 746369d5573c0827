# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "hpsv3==1.0.0",
#   "transformers==4.45.2",  # hpsv3 asks for this very version
#   "accelerate==1.0.1",
#   "trl==0.11.4",  # the last one for transformers 4.45
#   "peft==0.13.2",
#   "deepspeed==0.15.4",
#   "datasets==3.1.0",
#   "diffusers==0.31.0",
#   "huggingface-hub==0.26.5",
#   "matplotlib==3.9.4",  # hpsv3 imports matplotlib and tensorboard without asking for them
#   "tensorboard==2.18.0",
#   "opencv-python==4.10.0.84",
#   "numpy==1.26.4",
#   "pillow==11.0.0",
#   "torch==2.5.1",
#   "torchvision==0.20.1",
#   "setuptools==75.6.0",
#   "fastapi==0.165.0",
#   "prometheus-client==0.26.0",
#   "pydantic==2.14.3",
#   "uvicorn==0.54.0",
# ]
# ///
"""Serves HPSv3: how much would people like this picture for this prompt? Run with `uv run hpsv3.py --port 8100`.

Ma et al., arXiv 2508.03789. Qwen2-VL-7B with a head of its own that gives the mean and the uncertainty of a score; the
score is the mean. The package brings the model, not the weights: MizzenAI/HPSv3 and Qwen/Qwen2-VL-7B-Instruct are
fetched from the Hub.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

if not __package__:
    importlib.import_module("_package")

from numpy.typing import NDArray

from calibri_lightning.serving.protocol import PromptText, RewardInfo
from calibri_lightning.serving.scorer import Scorer
from calibri_lightning.serving.scripts.shared import add_model_options, batches, commit_of, to_pillow

_REPOSITORY, _FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"


class HPSv3Scorer(Scorer):
    """HPSv3 of the package hpsv3."""

    def __init__(self, device: str, batch_size: int = 4, weights: str | None = None, revision: str = "main") -> None:
        """Loads nothing yet.

        Args:
            device: Where the model runs.
            batch_size: Pictures of one forward.
            weights: File with the weights; by default fetched from the Hub.
            revision: Branch, tag or commit of the Hub's weights.
        """
        self.device, self._batch_size, self._weights, self._revision = device, batch_size, weights, revision
        self._model: Any = None

    def load(self) -> RewardInfo:
        """Loads the model.

        Returns:
            What scores.
        """
        from hpsv3 import HPSv3RewardInferencer

        weights = self._weights
        if weights is None:
            from huggingface_hub import hf_hub_download

            weights = hf_hub_download(_REPOSITORY, _FILE, revision=self._revision)
        self._model = HPSv3RewardInferencer(checkpoint_path=weights, device=self.device)
        return RewardInfo(
            name="hpsv3",
            model=_REPOSITORY,
            revision=f"{commit_of(weights)}, hpsv3 {version('hpsv3')}",
            preprocessing="hpsv3: RGB, 8 bits, 200704 pixels",
            pixels="uint8",
            extra_names=["hpsv3_sigma"],
        )

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        """Scores pictures.

        Args:
            images: B pictures.
            prompts: The prompt of each.

        Returns:
            The mean of each score, and its uncertainty as hpsv3_sigma.
        """
        import torch

        pictures, texts = to_pillow(images), [prompt.text for prompt in prompts]
        rows: list[list[float]] = []
        # The package itself keeps activations for a backward pass.
        with torch.inference_mode():
            for part in batches(len(pictures), self._batch_size):
                # By keyword: the order of the two differs between versions.
                rows += self._model.reward(image_paths=pictures[part], prompts=texts[part]).float().tolist()
        return {"hpsv3": [row[0] for row in rows], "hpsv3_sigma": [row[1] for row in rows]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this model.

    Args:
        parser: The command line's parser.
    """
    add_model_options(parser, batch_size=4)
    parser.add_argument("--weights", help=f"file with the weights; by default {_FILE} of {_REPOSITORY} from the Hub")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")


def make(options: argparse.Namespace) -> Scorer:
    """Makes the scorer that the command line asks for.

    Args:
        options: What was given.

    Returns:
        The scorer.
    """
    return HPSv3Scorer(options.device, options.batch_size, options.weights, options.revision)


if __name__ == "__main__":
    from calibri_lightning.serving.run import script_main

    script_main(make, add_options)
