"""What all rewards on a CLIP model share: loading, preprocessing, batches, devices.

CLIP: Radford et al., arXiv 2103.00020.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from calibri_lightning.backbones.loading import DType, torch_dtype
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import ModelInfo, Reward
from calibri_lightning.rewards.clip_text import TextEmbeddings
from calibri_lightning.rewards.loading import checked_batch_size, checked_device, commit_of, load_part, name_of
from calibri_lightning.rewards.pixels import to_pixels
from calibri_lightning.rewards.resizing import Resize, checked_resize, crop_centre

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPENAI_LARGE = "openai/clip-vit-large-patch14"
"""The CLIP that most rewards were made with; 1.7 GB in float32."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipParts:
    """What is loaded once."""

    model: PreTrainedModel
    """A CLIPModel, or its half that sees."""
    texts: TextEmbeddings | None
    """The half that reads; None where the reward reads nothing."""
    image_processor: Any
    """Pillow's preprocessing; None where the reward has its own."""


class ClipReward(Reward):
    """Scores pictures by their CLIP embeddings, in this process.

    The model is loaded on the CPU when a run checks its prompts, so that a missing one is found before any work, and
    moves to the device of the first pictures.
    """

    pixels = "uint8"
    published = OPENAI_LARGE
    """The weights that it is defined by."""
    published_processor: str | None = None
    """Tokenizer and preprocessing that their authors use with them; None for what lies beside them."""
    _kind: Literal["folder", "file or folder"] = "folder"
    """What weights on this machine may be."""

    def __init__(
        self,
        pretrained: str | None = None,
        processor: str | None = None,
        revision: str | None = None,
        dtype: DType = "float32",
        device: str | None = None,
        batch_size: int = 16,
        resize: Resize = "pillow",
    ) -> None:
        """Loads nothing yet.

        Args:
            pretrained: A folder or a Hub id of a CLIP model of transformers, with safetensors weights; by default the
                published one.
            processor: A folder or a Hub id of its tokenizer and preprocessing; by default its authors' choice for the
                published weights, and what lies beside them for others.
            revision: Branch, tag or commit of the Hub repository of the weights.
            dtype: Type of weights and activations: float32, or bfloat16 with half the memory and noisier scores.
            device: Where to score; by default where the pictures are.
            batch_size: Pictures of one forward.
            resize: Who brings pictures to the model's size: pillow, to the bits of published scores, or torch, which
                leaves them on their device.

        Raises:
            UserError: If dtype, device, batch_size or resize is none.
        """
        self._batch_size, self._resize = checked_batch_size(self.name, batch_size), checked_resize(self.name, resize)
        self._device = checked_device(self.name, device)
        self._dtype = torch_dtype(dtype)
        place = pretrained or self.published
        beside = self.published_processor if place == self.published else None
        self._pretrained, self._processor, self._revision = place, processor or beside or place, revision

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Loads the model.

        Args:
            prompts: Unused here.

        Raises:
            UserError: If the model cannot be loaded.
        """
        self._scorer  # noqa: B018 - loads

    def prepare(self, device: torch.device) -> None:
        """Moves the model to its device.

        Args:
            device: Where pictures will be.
        """
        self._scorer.model.to(self._device or device)

    def describe(self) -> ModelInfo:
        """Says what gives the scores; loads the model.

        Returns:
            The model, its commit where it comes from the Hub, and how a picture is brought to its size.

        Raises:
            UserError: If the model cannot be loaded.
        """
        self.check(())
        return ModelInfo(
            name_of(self._pretrained), commit_of(self._pretrained, self._revision), self._preprocessing_name()
        )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            float32 [B].

        Raises:
            UserError: If the model cannot be loaded.
        """
        self.check(prompts)
        device = self._device or images.device
        self.prepare(device)
        parts = [slice(start, start + self._batch_size) for start in range(0, len(images), self._batch_size)]
        with torch.inference_mode():
            return torch.cat([self._score(self._embed(images[part], device), prompts[part]) for part in parts])

    @abstractmethod
    def _score(self, seen: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores a batch: embeddings of pictures float32 [B, D] of length 1, and their prompts, to float32 [B]."""

    def _embed(self, images: Tensor, device: torch.device) -> Tensor:
        model = self._scorer.model
        pixels = self._preprocess(images, device).to(device, self._dtype)
        # get_image_features returns a tensor or a structure, depending on the version of transformers.
        seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return torch.nn.functional.normalize(seen.float(), dim=-1)

    def _preprocess(self, images: Tensor, device: torch.device) -> Tensor:
        if self._resize == "torch":
            return crop_centre(images.to(device), self._scorer.image_processor)
        # Said, not guessed: of a picture 1 or 3 pixels high, transformers takes the rows for channels.
        done = self._scorer.image_processor(
            list(to_pixels(images)), return_tensors="pt", input_data_format="channels_last"
        )
        pixels: Tensor = done["pixel_values"]
        return pixels

    def _preprocessing_name(self) -> str:
        return f"{self._resize}-shortest-side-crop-{self._scorer.model.config.vision_config.image_size}"

    @cached_property
    def _scorer(self) -> ClipParts:
        """What is loaded; Pillow preprocesses whether or not torchvision is installed: scores do not depend on that."""
        model = load_part(self.name, "weights", self._pretrained, self._load_model, kind=self._kind)
        return ClipParts(model, self._load_texts(model), self._load_image_processor())

    def _load_model(self, place: str) -> PreTrainedModel:
        from transformers import CLIPModel

        model, report = CLIPModel.from_pretrained(
            place, revision=self._revision, dtype=self._dtype, use_safetensors=True, output_loading_info=True
        )
        wrong = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        if wrong:
            raise ValueError(f"no CLIP model, or an incomplete one: {len(wrong)} tensors are absent, {wrong[0]} first")
        made: PreTrainedModel = model.requires_grad_(False).eval()
        return made

    def _load_texts(self, model: PreTrainedModel) -> TextEmbeddings | None:
        from transformers import AutoTokenizer

        def load(place: str) -> Any:
            return AutoTokenizer.from_pretrained(place, revision=self._processor_revision)

        return TextEmbeddings(model, load_part(self.name, "tokenizer", self._processor, load))

    def _load_image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        def load(place: str) -> Any:
            return AutoImageProcessor.from_pretrained(place, backend="pil", revision=self._processor_revision)

        return load_part(self.name, "preprocessing", self._processor, load)

    @property
    def _processor_revision(self) -> str | None:
        return self._revision if self._processor == self._pretrained else None


class PromptClipReward(ClipReward):
    """Scores pictures by their prompts: the cosine of the two embeddings, on the scale of a reward's choice."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Loads the model, and says once which prompts it cannot read to their end.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If the model cannot be loaded.
        """
        super().check(prompts)
        new = [text for text in dict.fromkeys(prompt.text for prompt in prompts) if text not in self._measured]
        self._measured.update(new)
        cut = self._texts.too_long(new)
        if cut:
            _log.warning(
                "%s reads the first %d tokens of a prompt: %d of %d go on after that, for instance %r.",
                self.name,
                self._texts.max_tokens,
                len(cut),
                len(new),
                cut[0],
            )

    def _score(self, seen: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self._scale() * (seen * self._texts([prompt.text for prompt in prompts])).sum(dim=-1)

    def _scale(self) -> Tensor | float:
        """What a cosine is multiplied with."""
        return 1.0

    @property
    def _texts(self) -> TextEmbeddings:
        texts = self._scorer.texts
        assert texts is not None
        return texts

    @cached_property
    def _measured(self) -> set[str]:
        """Prompts whose length has been looked at."""
        return set()
