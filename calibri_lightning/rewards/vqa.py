"""Rewards that ask a vision-language model about a picture: VQAScore, and Soft-TIFA of GenEval 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibri_lightning.backbones.loading import DType
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import ModelInfo, Reward
from calibri_lightning.rewards.pixels import to_pixels
from calibri_lightning.rewards.questions import (
    SOFT_TIFA_TEMPLATE,
    VQASCORE_TEMPLATE,
    Atom,
    Mean,
    Query,
    atoms_of,
    check_mean,
    check_template,
    fill,
    mean,
    share_of_yes,
)
from calibri_lightning.rewards.vlm_loading import PUBLISHED
from calibri_lightning.rewards.vlm_model import VisionLanguageModel


class AskingReward(Reward):
    """What the rewards that ask a vision-language model share."""

    pixels = "uint8"
    _model: VisionLanguageModel

    def prepare(self, device: torch.device) -> None:
        """Moves the model to its device.

        Args:
            device: Where pictures will be.
        """
        self._model.to(device)

    def describe(self) -> ModelInfo:
        """Says which model is asked; loads it.

        Returns:
            The model and the revision of its weights.
        """
        return self._model.describe()


class VQAScore(AskingReward):
    """The probability that a model answers "Yes" when asked whether the picture shows the prompt.

    Lin et al., arXiv 2404.01291, with a model of the Qwen-VL kind. The model is loaded on the CPU when a run checks its
    prompts, and moves to the device of the first pictures.
    """

    name = "vqascore"

    def __init__(
        self,
        pretrained: str = PUBLISHED,
        revision: str | None = None,
        dtype: DType = "bfloat16",
        device: str | None = None,
        batch_size: int = 1,
        template: str = VQASCORE_TEMPLATE,
        normalised: bool = False,
        max_pixels: int | None = None,
    ) -> None:
        """Loads nothing yet.

        Args:
            pretrained: A folder or a Hub id of a Qwen-VL model of transformers, with safetensors weights.
            revision: Branch, tag or commit of the Hub repository.
            dtype: Type of weights and activations: bfloat16, or float32 with twice the memory and finer scores.
            device: Where to score; by default where the pictures are.
            batch_size: Pictures of one forward; with more than 1 a score depends on
                the others by rounding, which is coarse in bfloat16.
            template: The question; {text} stands for the prompt. To be answered by yes or no.
            normalised: Score P(Yes) / (P(Yes) + P(No)) instead of P(Yes).
            max_pixels: Larger pictures are shrunk to so many pixels; by default the model's own limit.

        Raises:
            UserError: If an option is none of these.
        """
        if not isinstance(normalised, bool):
            raise UserError(f"normalised of the reward 'vqascore' is {normalised!r}; it must be true or false.")
        check_template(self.name, template, "text")
        self._model = VisionLanguageModel(self.name, pretrained, revision, dtype, device, batch_size, max_pixels)
        self._template, self._normalised = template, normalised

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Loads the model.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If the model cannot be loaded, or a prompt holds one of its control tokens.
        """
        self._model.load()
        for text in dict.fromkeys(prompt.text for prompt in prompts):
            self._model.check(self._question(text))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            float32 [B] in 0..1; with `normalised` NaN where neither answer has any probability.

        Raises:
            UserError: If the model cannot be loaded, or a prompt holds one of its control tokens.
        """
        self.check(prompts)
        self._model.to(images.device)
        answers = ("Yes", "No") if self._normalised else ("Yes",)
        queries = [Query(place, self._question(prompt.text), answers) for place, prompt in enumerate(prompts)]
        found = self._model.probabilities(to_pixels(images), queries)
        return torch.tensor([share_of_yes(*pair) if self._normalised else pair[0] for pair in found])

    def _question(self, text: str) -> str:
        return fill(self._template, "text", text)


class SoftTifa(AskingReward):
    """The mean of the probabilities of the expected answers to a prompt's questions.

    Soft-TIFA of GenEval 2 (Kamath et al., arXiv 2512.16853). Questions and answers come from the prompt's metadata, see
    `calibri_lightning.rewards.questions.atoms_of`. The model is loaded on the CPU when a run checks its prompts, and
    moves to the device of the first pictures.
    """

    name = "soft_tifa"

    def __init__(
        self,
        pretrained: str = PUBLISHED,
        revision: str | None = None,
        dtype: DType = "bfloat16",
        device: str | None = None,
        batch_size: int = 1,
        template: str = SOFT_TIFA_TEMPLATE,
        mean: Mean = "geometric",
        max_pixels: int | None = None,
    ) -> None:
        """Loads nothing yet.

        Args:
            pretrained: A folder or a Hub id of a Qwen-VL model of transformers, with safetensors weights.
            revision: Branch, tag or commit of the Hub repository.
            dtype: Type of weights and activations: bfloat16, or float32 with twice the memory and finer scores.
            device: Where to score; by default where the pictures are.
            batch_size: Questions of one forward; with more than 1 a score depends on
                the others by rounding, which is coarse in bfloat16.
            template: What the model is asked; {question} stands for the question of the prompt.
            mean: Geometric (GenEval 2's estimate for a prompt, "GM") or arithmetic (for its parts, "AM"). The other one
                is reported as `soft_tifa_arithmetic` or `soft_tifa_geometric`.
            max_pixels: Larger pictures are shrunk to so many pixels; by default the model's own limit.

        Raises:
            UserError: If an option is none of these.
        """
        check_template(self.name, template, "question")
        check_mean(self.name, mean)
        self._model = VisionLanguageModel(self.name, pretrained, revision, dtype, device, batch_size, max_pixels)
        self._template, self._mean = template, mean
        self._other: Mean = "arithmetic" if mean == "geometric" else "geometric"
        self.extra_names = (f"{self.name}_{self._other}",)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Reads the questions of all prompts, and loads the model.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If a prompt has no questions, or the model cannot be loaded.
        """
        questions = {self._question(atom) for prompt in prompts for atom in atoms_of(prompt, self.name)}
        self._model.load()
        for question in sorted(questions):
            self._model.check(question)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            float32 [B] in 0..1.

        Raises:
            UserError: If a prompt has no questions, or the model cannot be loaded.
        """
        return self.measure(images, prompts)[self.name]

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """Scores pictures, with the other mean.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            float32 [B] in 0..1 under the reward's name and that of the other mean.

        Raises:
            UserError: If a prompt has no questions, or the model cannot be loaded.
        """
        self.check(prompts)
        self._model.to(images.device)
        queries = [
            Query(place, self._question(atom), (atom.answer,))
            for place, prompt in enumerate(prompts)
            for atom in atoms_of(prompt, self.name)
        ]
        found = self._model.probabilities(to_pixels(images), queries)
        of_picture: list[list[float]] = [[] for _ in prompts]
        for query, [probability] in zip(queries, found, strict=True):
            of_picture[query.picture].append(probability)
        return {
            name: torch.tensor([mean(values, kind) for values in of_picture])
            for name, kind in zip((self.name, *self.extra_names), (self._mean, self._other), strict=True)
        }

    def _question(self, atom: Atom) -> str:
        return fill(self._template, "question", atom.question)
