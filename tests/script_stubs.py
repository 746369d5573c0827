"""Stands in for libraries that cannot be installed beside this package; each has the documented calls, and no more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import calibri_lightning

HPSV3 = """
import torch
from PIL import Image

print("a line that a library prints")


class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        assert device == "cpu" and checkpoint_path.endswith(".safetensors")

    def reward(self, image_paths, prompts):
        assert torch.is_inference_mode_enabled()
        assert 0 < len(prompts) == len(image_paths) <= 4
        assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in image_paths)
        reds = [image.getpixel((0, 0))[0] for image in image_paths]
        return torch.tensor([[red + len(prompt), 9.0] for red, prompt in zip(reds, prompts)], dtype=torch.bfloat16)
"""

IMAGE_REWARD = """
from PIL import Image


class _Model:
    class blip:
        @staticmethod
        def tokenizer(text):
            return {"input_ids": text.split()}

    def score(self, prompt, image):
        assert isinstance(prompt, str) and isinstance(image, Image.Image)
        return image.getpixel((0, 0))[0] / 100 + len(prompt)


def load(name="ImageReward-v1.0", device="cuda", download_root=None, med_config=None):
    assert device == "cpu"
    return _Model()
"""

MMDET = """
__version__ = "2.28.2"
"""

MMDET_APIS = '''
import numpy as np


class _Detector:
    CLASSES = ("dog", "mouse")


def init_detector(config, checkpoint=None, device="cuda:0", cfg_options=None):
    assert str(config).endswith(".py") and device == "cpu"
    return _Detector()


def inference_detector(model, imgs):
    """Finds one dog and one mouse: where blue (BGR), and where red is 200 and more; the mouse only just."""
    return [_find(image) for image in imgs]


def _find(image):
    boxes, masks = [], []
    for channel, sure in ((0, 0.95), (2, 0.6)):
        mask = image[..., channel] >= 200
        rows, columns = np.nonzero(mask)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, sure] if mask.any() else []
        boxes.append(np.array(edges, np.float32).reshape(-1, 5))
        masks.append([mask] if mask.any() else [])
    return boxes, masks
'''

OPEN_CLIP = """
import numpy as np
import torch
from torch import nn

_COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "black": (-1, -1, -1),
            "yellow": (1, 1, 0), "orange": (1, 0.6, 0), "purple": (0.6, 0, 1), "pink": (1, 0.6, 0.8),
            "brown": (0.6, 0.4, 0)}


class _Clip(nn.Module):
    def encode_text(self, tokens):
        return tokens

    def encode_image(self, crops):
        return crops.mean(dim=(2, 3))


def _transform(picture):
    values = torch.tensor(np.array(picture)).permute(2, 0, 1).float() / 255
    return values.mean(dim=(1, 2), keepdim=True)


def create_model_and_transforms(name, pretrained=None, device="cpu"):
    assert (name, pretrained) == ("ViT-L-14", "openai")
    return _Clip(), None, _transform


def get_tokenizer(name):
    def tokenize(texts):
        named = [next(c for c in _COLOURS if f" {c}" in text) for text in texts]
        return torch.tensor([_COLOURS[name] for name in named], dtype=torch.float32)
    return tokenize
"""

TRANSFORMERS = """
import torch
from PIL import Image

CALLS = []


class AutoModelForCausalLM:
    @classmethod
    def from_pretrained(cls, name, **kwargs):
        CALLS.append((name, kwargs))
        return cls()

    def eval(self):
        return self

    def score(self, images, task_="quality", input_="image"):
        assert input_ == "image" and len(images) <= 3 and all(isinstance(image, Image.Image) for image in images)
        shift = {"quality": 0.0, "aesthetics": 0.5}[task_]
        return torch.tensor([image.getpixel((0, 0))[0] / 64 + shift for image in images], dtype=torch.float16)
"""

_FILES = {
    "hpsv3": {"hpsv3/__init__.py": HPSV3, "hpsv3-1.0.0.dist-info/METADATA": "Name: hpsv3\nVersion: 1.0.0\n"},
    "imagereward": {
        "ImageReward/__init__.py": IMAGE_REWARD,
        "image_reward-1.5.dist-info/METADATA": "Name: image-reward\nVersion: 1.5\n",
    },
    "q_align": {"transformers/__init__.py": TRANSFORMERS},
    "deqa": {"transformers/__init__.py": TRANSFORMERS},
    "geneval": {
        "mmdet/__init__.py": MMDET,
        "mmdet/apis.py": MMDET_APIS,
        "open_clip/__init__.py": OPEN_CLIP,
    },
}
MODULES = ("hpsv3", "ImageReward", "transformers", "mmdet", "mmdet.apis", "open_clip")
"""What a stub is imported as."""


def write_stubs(script: str, folder: Path) -> Path:
    """Writes the stand-ins for a script's libraries into a folder, which is to come first on the path."""
    for name, text in _FILES[script].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@contextmanager
def served(script: str, folder: Path, *words: str) -> Iterator[str]:
    """Runs a script as a file, in a process that knows this package by nothing but that file; its URL."""
    file = Path(calibri_lightning.__file__).parent / "serving" / "scripts" / f"{script}.py"
    kept = {name: value for name, value in os.environ.items() if name != "CALIBRI_REWARD_TOKEN"}
    with subprocess.Popen(
        [sys.executable, str(file), "--device", "cpu", "--port", "0", *words],
        env=kept | {"PYTHONPATH": str(write_stubs(script, folder))},
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            ready = next(line for line in process.stdout if line.startswith("ready on"))
            url = re.search(r"https?://[\d.]+:\d+", ready)
            assert url is not None, ready
            yield url[0]
        finally:
            process.terminate()
    assert process.returncode == 0
