# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "image-reward==1.5",
#   "timm==0.6.13",  # image-reward asks for these versions of timm and fairscale
#   "fairscale==0.4.13",
#   "transformers==4.45.2",  # later ones miss what image-reward imports
#   "huggingface-hub==0.26.5",
#   "diffusers==0.31.0",
#   "accelerate==1.0.1",
#   "datasets==3.1.0",
#   "clip-anytorch==2.6.0",  # image-reward imports OpenAI's clip without asking for it
#   "setuptools==69.5.1",  # clip needs pkg_resources.packaging, which later ones lack
#   "numpy==1.26.4",
#   "pillow==11.0.0",
#   "torch==2.5.1",
#   "torchvision==0.20.1",
#   "fastapi==0.165.0",
#   "prometheus-client==0.26.0",
#   "pydantic==2.14.3",
#   "uvicorn==0.54.0",
# ]
# ///
"""Serves ImageReward: would people choose this picture for this prompt? Run with `uv run imagereward.py --port 8103`.

Xu et al., arXiv 2304.05977. BLIP with a head; scores are about -2 to 2, by their authors' normalisation of mean 0 and
variance 1 on their data. It reads 35 tokens of a prompt and drops the rest. THUDM/ImageReward and bert-base-uncased are
fetched from the Hub.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

if not __package__:
    importlib.import_module("_package")

from numpy.typing import NDArray

from calibri_lightning.serving.protocol import PromptText, RewardInfo
from calibri_lightning.serving.scorer import Scorer
from calibri_lightning.serving.scripts.shared import to_pillow

_MAX_TOKENS = 35
_log = logging.getLogger(__name__)


class ImageRewardScorer(Scorer):
    """ImageReward of the package image-reward."""

    def __init__(self, device: str, weights: str | None = None, med_config: str | None = None) -> None:
        """Loads nothing yet.

        Args:
            device: Where the model runs.
            weights: File with the weights, ImageReward.pt; by default fetched from the Hub.
            med_config: Its med_config.json; by default fetched from the Hub.
        """
        self.device, self._weights, self._med_config = device, weights, med_config
        self._model: Any = None

    def load(self) -> RewardInfo:
        """Loads the model.

        Returns:
            What scores.
        """
        import ImageReward

        name = self._weights or "ImageReward-v1.0"
        self._model = ImageReward.load(name, device=self.device, med_config=self._med_config)
        return RewardInfo(
            name="imagereward",
            model=name,
            revision=f"image-reward {version('image-reward')}",
            preprocessing="image-reward: RGB, 8 bits, centre of 224 pixels",
            pixels="uint8",
        )

    def check(self, prompts: Sequence[PromptText]) -> str | None:
        """Says in the log which prompts it will not read to their end.

        Args:
            prompts: The prompts.

        Returns:
            None: it can score them all.
        """
        tokenizer = self._model.blip.tokenizer
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        cut = [text for text in texts if len(tokenizer(text)["input_ids"]) > _MAX_TOKENS]
        if cut:
            _log.warning(
                "ImageReward reads the first %d tokens of a prompt: %d of %d go on after that, for instance %r.",
                _MAX_TOKENS,
                len(cut),
                len(texts),
                cut[0],
            )
        return None

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        """Scores pictures.

        Args:
            images: B pictures.
            prompts: The prompt of each.

        Returns:
            The score of each.
        """
        import torch

        # One by one: the package scores several pictures of one prompt at once, not pictures of several prompts.
        with torch.inference_mode():
            pairs = zip(to_pillow(images), prompts, strict=True)
            return {"imagereward": [float(self._model.score(prompt.text, image)) for image, prompt in pairs]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this model.

    Args:
        parser: The command line's parser.
    """
    parser.add_argument("--device", default="cuda", help="where the model runs: cuda, cuda:1 or cpu")
    parser.add_argument("--weights", help="ImageReward.pt; by default from THUDM/ImageReward on the Hub")
    parser.add_argument("--med-config", help="med_config.json; by default from THUDM/ImageReward on the Hub")


def make(options: argparse.Namespace) -> Scorer:
    """Makes the scorer that the command line asks for.

    Args:
        options: What was given.

    Returns:
        The scorer.
    """
    return ImageRewardScorer(options.device, options.weights, options.med_config)


if __name__ == "__main__":
    from calibri_lightning.serving.run import script_main

    script_main(make, add_options)
