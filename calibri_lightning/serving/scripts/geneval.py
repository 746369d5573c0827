# /// script
# requires-python = "==3.10.*"
# dependencies = [
#   "mmdet==2.28.2",
#   "mmcv-full==1.7.2",  # with its operators compiled; the last of its line
#   "yapf==0.40.1",  # later ones break mmcv 1.7
#   "open-clip-torch==2.20.0",
#   "timm==0.9.2",
#   "huggingface-hub==0.20.3",
#   "opencv-python-headless==4.8.1.78",
#   "pycocotools==2.0.7",
#   "numpy==1.23.5",
#   "pillow==10.4.0",
#   "setuptools==69.5.1",
#   "torch==1.13.1",
#   "torchvision==0.14.1",
#   "fastapi==0.162.5",  # the last one for Python 3.10
#   "prometheus-client==0.26.0",
#   "pydantic==2.14.3",
#   "uvicorn==0.54.0",
# ]
#
# [tool.uv]
# find-links = ["https://download.openmmlab.com/mmcv/dist/cu117/torch1.13/index.html"]
# ///
"""Serves GenEval: are the prompt's objects there, in number, colour and place?

Run with `uv run geneval.py --detector mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth`.

Ghosh et al., arXiv 2310.11513. Mask2Former finds objects, CLIP ViT-L/14 names their colours. A prompt's metadata are
those of GenEval's evaluation_metadata.jsonl. The score is that part of the conditions that hold (`geneval_rules`);
beside it stand the benchmark's own verdict, `geneval_correct`, and the one without surplus objects, `geneval_strict`.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    importlib.import_module("_package")

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibri_lightning.serving.protocol import PromptText, RewardInfo
from calibri_lightning.serving.scorer import Scorer
from calibri_lightning.serving.scripts.geneval_rules import COLOURS, Found, class_names, judge, problem_of
from calibri_lightning.serving.scripts.shared import add_model_options, batches, to_pillow

_CONFIG = ".mim/configs/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py"
_CLIP = "ViT-L-14"
_THRESHOLD, _COUNTING_THRESHOLD, _MAX_OBJECTS = 0.3, 0.9, 16
_BACKGROUND = "#999"
_PHRASES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class GenEvalScorer(Scorer):
    """GenEval with the detector and the classifier of its authors."""

    def __init__(
        self, device: str, detector: str, batch_size: int = 8, config: str | None = None, clip: str = "openai"
    ) -> None:
        """Loads nothing yet.

        Args:
            device: Where the models run.
            detector: File with the detector's weights.
            batch_size: Pictures of one forward of the detector.
            config: The detector's configuration of mmdetection; by default the one of these weights.
            clip: File with the weights of CLIP ViT-L/14; by default OpenAI's, fetched.
        """
        self.device, self._weights, self._batch_size = device, detector, batch_size
        self._config, self._clip = config, clip
        self._detector: Any = None
        self._classifier: Any = None
        self._classes: list[str] = []
        self._colour_embeddings: dict[str, Any] = {}

    def load(self) -> RewardInfo:
        """Loads the models.

        Returns:
            What scores.
        """
        import mmdet
        import open_clip
        from mmdet.apis import init_detector

        config = self._config or str(Path(mmdet.__file__).parent / _CONFIG)
        self._detector = init_detector(config, self._weights, device=self.device)
        self._classes = class_names(self._detector.CLASSES)
        model, _, transform = open_clip.create_model_and_transforms(_CLIP, pretrained=self._clip, device=self.device)
        self._classifier = (model.eval(), transform, open_clip.get_tokenizer(_CLIP))
        return RewardInfo(
            name="geneval",
            model=f"{Path(self._weights).name}, CLIP {_CLIP} {Path(self._clip).name}",
            revision=f"mmdet {mmdet.__version__}",
            preprocessing=f"geneval: BGR, 8 bits, thresholds {_THRESHOLD} and {_COUNTING_THRESHOLD}",
            pixels="uint8",
            extra_names=["geneval_correct", "geneval_strict"],
        )

    def check(self, prompts: Sequence[PromptText]) -> str | None:
        """Looks for prompts without GenEval's metadata.

        Args:
            prompts: The prompts.

        Returns:
            What is wrong with the first of them; None if nothing is.
        """
        for prompt in prompts:
            problem = problem_of(prompt.metadata, self._classes)
            if problem is not None:
                return f"The prompt {prompt.text!r} cannot be scored by GenEval: {problem}."
        return None

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        """Scores pictures.

        Args:
            images: B pictures.
            prompts: The prompt of each, with metadata.

        Returns:
            0 to 1 for each as geneval, and 0 or 1 as geneval_correct and geneval_strict; NaN without metadata.
        """
        pictures = to_pillow(images)
        rows: list[tuple[float, float, float]] = []
        for part in batches(len(pictures), self._batch_size):
            found = self._detect(pictures[part])
            rows += [self._judge(*each) for each in zip(pictures[part], found, prompts[part], strict=True)]
        names = ("geneval", "geneval_correct", "geneval_strict")
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}

    def _detect(self, pictures: Sequence[Image.Image]) -> list[Any]:
        from mmdet.apis import inference_detector

        # Arrays are BGR to mmdetection, as its own reader of files makes them.
        arrays = [np.ascontiguousarray(np.asarray(picture)[:, :, ::-1]) for picture in pictures]
        found: list[Any] = inference_detector(self._detector, arrays)
        return found

    def _judge(self, picture: Image.Image, result: Any, prompt: PromptText) -> tuple[float, float, float]:
        if problem_of(prompt.metadata, self._classes) is not None:
            return math.nan, math.nan, math.nan
        boxes, masks = result if isinstance(result, tuple) else (result, None)
        threshold = _COUNTING_THRESHOLD if prompt.metadata.get("tag") == "counting" else _THRESHOLD
        objects = {}
        for index, name in enumerate(self._classes):
            surest = [row for row in np.argsort(-boxes[index][:, 4]) if boxes[index][row, 4] > threshold]
            objects[name] = [
                Found(boxes[index][row, :4], None if masks is None else np.asarray(masks[index][row], bool))
                for row in surest[:_MAX_OBJECTS]
            ]
        verdict = judge(prompt.metadata, objects, lambda some, name: self._colours(picture, some, name))
        return verdict.partial, float(verdict.correct), float(verdict.strict)

    def _colours(self, picture: Image.Image, objects: Sequence[Found], name: str) -> list[str]:
        import torch

        model, transform, tokenizer = self._classifier
        with torch.inference_mode():
            if name not in self._colour_embeddings:
                rows = []
                for colour in COLOURS:
                    phrases = [phrase.format(colour=colour, name=name) for phrase in _PHRASES]
                    texts = model.encode_text(tokenizer(phrases).to(self.device)).float()
                    mean = torch.nn.functional.normalize(texts, dim=-1).mean(dim=0)
                    rows.append(torch.nn.functional.normalize(mean, dim=-1))
                self._colour_embeddings[name] = torch.stack(rows)
            crops = torch.stack([transform(crop_of(picture, each)) for each in objects]).to(self.device)
            features = torch.nn.functional.normalize(model.encode_image(crops).float(), dim=-1)
            best = (features @ self._colour_embeddings[name].T).argmax(dim=1)
        return [COLOURS[index] for index in best.tolist()]


def crop_of(picture: Image.Image, found: Found) -> Image.Image:
    """Cuts an object out of a picture, its surroundings grey.

    Args:
        picture: The picture.
        found: The object.

    Returns:
        Its box, at least one pixel wide and high.
    """
    shown = picture
    if found.mask is not None:
        mask = Image.fromarray(found.mask.astype(np.uint8) * 255, "L")
        shown = Image.composite(picture, Image.new("RGB", picture.size, _BACKGROUND), mask)
    left, top, right, bottom = (round(float(value)) for value in found.box)
    return shown.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this model.

    Args:
        parser: The command line's parser.
    """
    add_model_options(parser, batch_size=8)
    parser.add_argument("--detector", required=True, help="file with the weights of Mask2Former, .pth of mmdetection")
    parser.add_argument("--detector-config", help="its configuration; by default the one of Swin-S in mmdetection 2.28")
    parser.add_argument("--clip", default="openai", help="file with CLIP ViT-L/14; openai is fetched")


def make(options: argparse.Namespace) -> Scorer:
    """Makes the scorer that the command line asks for.

    Args:
        options: What was given.

    Returns:
        The scorer.
    """
    return GenEvalScorer(options.device, options.detector, options.batch_size, options.detector_config, options.clip)


if __name__ == "__main__":
    from calibri_lightning.serving.run import script_main

    script_main(make, add_options)
