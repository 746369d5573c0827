"""The improved aesthetic predictor (version 2): how beautiful would people find a picture?

Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor: linear layers on the embedding of a CLIP
ViT-L/14, scaled to length 1. They were fitted to ratings from 1 to 10; pictures of today's models get 5 to 6.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibri_lightning.backbones.loading import DType
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import ModelInfo
from calibri_lightning.rewards.clip_model import ClipReward
from calibri_lightning.rewards.loading import check_names, commit_of, find_file, load_part, name_of, read_tensors
from calibri_lightning.rewards.resizing import Resize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PUBLISHED_HEAD = "ttj/sac-logos-ava1-l14-linearMSE"
"""The published layers (sac+logos+ava1-l14-linearMSE.pth) as safetensors."""
HEAD_FILE = "model.safetensors"

_PLACES = (0, 2, 4, 6, 7)
"""Where the linear layers stand in the authors' list; dropout, which does nothing here, stands between them."""
_WIDTHS = (1024, 128, 64, 16, 1)


class Aesthetic(ClipReward):
    """The predicted rating; prompts are not read."""

    name = "aesthetic"

    def __init__(
        self,
        pretrained: str | None = None,
        processor: str | None = None,
        revision: str | None = None,
        dtype: DType = "float32",
        device: str | None = None,
        batch_size: int = 16,
        resize: Resize = "pillow",
        head: str = PUBLISHED_HEAD,
        head_file: str = HEAD_FILE,
        head_revision: str | None = None,
    ) -> None:
        """Loads nothing yet.

        Args:
            pretrained: A folder or a Hub id of the CLIP model that the head was fitted on, with safetensors weights.
            processor: A folder or a Hub id of its preprocessing; by default what lies beside the weights.
            revision: Branch, tag or commit of the Hub repository of the CLIP model.
            dtype: Type of weights and activations of the CLIP model: float32, or bfloat16 with half the memory and
                noisier scores. The head always computes in float32.
            device: Where to score; by default where the pictures are.
            batch_size: Pictures of one forward.
            resize: Who brings pictures to the model's size: pillow, to the bits of published scores, or torch, which
                leaves them on their device.
            head: The layers on top: a file, a folder or a Hub id.
            head_file: The file in that folder or repository: safetensors, or a .pth of tensors only.
            head_revision: Branch, tag or commit of the Hub repository of the head.

        Raises:
            UserError: If dtype, device, batch_size or resize is none.
        """
        super().__init__(pretrained, processor, revision, dtype, device, batch_size, resize)
        self._head_place, self._head_file, self._head_revision = head, head_file, head_revision

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Loads the model and its head.

        Args:
            prompts: Unused.

        Raises:
            UserError: If one of the two cannot be loaded.
        """
        super().check(prompts)
        self._head  # noqa: B018 - loads

    def prepare(self, device: torch.device) -> None:
        """Moves the model and its head to their device.

        Args:
            device: Where pictures will be.
        """
        super().prepare(device)
        self._head.to(self._device or device)

    def describe(self) -> ModelInfo:
        """Says what gives the scores; loads the model and its head.

        Returns:
            Both, their commits where they come from the Hub, and how a picture is brought to its size.

        Raises:
            UserError: If one of the two cannot be loaded.
        """
        clip = super().describe()
        commit = commit_of(self._head_place, self._head_revision, self._head_file)
        return ModelInfo(
            f"{clip.model} + {name_of(self._head_place)}", f"{clip.revision} + {commit}", clip.preprocessing
        )

    def _score(self, seen: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        ratings: Tensor = self._head(seen)
        return ratings.squeeze(-1)

    def _load_model(self, place: str) -> PreTrainedModel:
        model = super()._load_model(place)
        # Half of the memory; the class for half a CLIP takes the width of the embeddings from another place.
        del model.text_model, model.text_projection
        return model

    def _load_texts(self, model: PreTrainedModel) -> None:
        """It reads nothing."""

    @cached_property
    def _head(self) -> nn.Sequential:
        def load(place: str) -> nn.Sequential:
            path: Path = find_file(place, self._head_file, self._head_revision)
            return make_head(read_tensors(path), self._scorer.model.config.projection_dim)

        return load_part(self.name, "head", self._head_place, load, option="head", kind="file or folder")


def make_head(tensors: Mapping[str, Tensor], width: int) -> nn.Sequential:
    """Makes the predictor of its weights.

    Args:
        tensors: The authors' `layers.0.weight` and so on. The vision tower, which some files hold as well, is left out:
            it is that of the CLIP model.
        width: Width of the embeddings.

    Returns:
        Linear layers without activations, in float32, from embeddings [B, width] of length 1 to ratings [B, 1].

    Raises:
        ValueError: If these are weights of something else.
    """
    ours = {k: v.float() for k, v in tensors.items() if not k.startswith(("vision_model.", "visual_projection."))}
    names: dict[str, str] = {
        f"layers.{place}.{part}": f"{i}.{part}" for i, place in enumerate(_PLACES) for part in ("weight", "bias")
    }
    check_names(set(ours), set(names), "the aesthetic predictor")
    fitted = ours["layers.0.weight"].shape[-1]
    if fitted != width:
        raise ValueError(f"it was fitted on embeddings of width {fitted}, those of the CLIP model have {width}")
    with torch.device("meta"):  # without values: they would be drawn from the global generator
        layers: list[Any] = [nn.Linear(inner, outer) for inner, outer in pairwise((width, *_WIDTHS))]
        head = nn.Sequential(*layers)
    head.load_state_dict({names[name]: value for name, value in ours.items()}, assign=True)
    return head.requires_grad_(False).eval()
