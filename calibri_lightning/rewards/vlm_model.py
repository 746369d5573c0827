"""How probable answers to questions about pictures are to a vision-language model of the Qwen-VL kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.backbones.loading import DType, torch_dtype
from calibri_lightning.errors import UserError
from calibri_lightning.rewards.base import ModelInfo
from calibri_lightning.rewards.loading import checked_batch_size, checked_device, commit_of, name_of
from calibri_lightning.rewards.questions import Query, answer_forms
from calibri_lightning.rewards.vlm_loading import LoadedVlm, load_vlm

_Tokens = tuple[int, ...]


@dataclass(frozen=True)
class _Picture:
    """A picture as the model sees it."""

    patches: Tensor
    """float32 [P, C]."""
    grid: Tensor
    """int64 [1, 3]: frames, rows and columns of patches."""
    num_tokens: int
    """Places that it takes in the text."""


@dataclass(frozen=True)
class _Row:
    """One text that goes through the model."""

    query: int
    """Its place among the queries."""
    tokens: _Tokens
    """The dialogue up to the answer."""
    forced: _Tokens
    """First tokens of an answer, put into the model's mouth."""
    picture: _Picture


class VisionLanguageModel:
    """Probabilities of answers; loads when it is first needed."""

    def __init__(
        self,
        reward: str,
        pretrained: str,
        revision: str | None,
        dtype: DType,
        device: str | None,
        batch_size: int,
        max_pixels: int | None,
    ) -> None:
        """Loads nothing yet.

        Args:
            reward: Name of the reward that asks, for messages.
            pretrained: A folder or a Hub id, with safetensors weights.
            revision: Branch, tag or commit of the Hub repository.
            dtype: Type of weights and activations.
            device: Where to score; by default where the pictures are.
            batch_size: Questions of one forward.
            max_pixels: Larger pictures are shrunk to so many pixels; by default the image processor's own limit.

        Raises:
            UserError: If dtype, device, batch_size or max_pixels is none.
        """
        if max_pixels is not None and (
            isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1
        ):
            raise UserError(f"max_pixels of the reward {reward!r} is {max_pixels!r}; it must be a number from 1 up.")
        self._device, self._batch_size = checked_device(reward, device), checked_batch_size(reward, batch_size)
        self._reward, self._pretrained, self._revision = reward, pretrained, revision
        self._dtype, self._max_pixels = torch_dtype(dtype), max_pixels
        self._sequences: dict[str, tuple[_Tokens, ...]] = {}

    def load(self) -> None:
        """Loads the model on the CPU, unless it is loaded.

        Raises:
            UserError: If it cannot be loaded, or is none of the Qwen-VL kind.
        """
        _ = self._loaded

    def check(self, question: str) -> None:
        """Refuses a question that would be taken for a part of the dialogue.

        Args:
            question: The question, template and all.

        Raises:
            UserError: If it holds one of the model's control tokens, or the model cannot be loaded.
        """
        tokenizer = self._loaded.tokenizer
        found = [token for token in tokenizer.get_added_vocab() if token in question]
        if found:
            raise UserError(
                f"The reward {self._reward!r} cannot ask {question!r}: {found[0]!r} is a control token of its model. "
                "Take it out of the prompt."
            )

    def to(self, device: torch.device) -> None:
        """Moves the model.

        Args:
            device: Where pictures will be; the configured device goes before.
        """
        self._loaded.model.to(self._device or device)

    def describe(self) -> ModelInfo:
        """Says what gives the answers; loads the model.

        Returns:
            The model, the commit of weights from the Hub (else "unknown"), and the sizes that pictures are resized to.
        """
        low, high = self._size
        return ModelInfo(
            name_of(self._pretrained),
            commit_of(self._pretrained, self._revision),
            f"qwen-vl pil {low}..{high} pixels",
        )

    def probabilities(self, pixels: NDArray[np.uint8], queries: Sequence[Query]) -> list[tuple[float, ...]]:
        """Asks, and reads how probable answers are.

        The probability of an answer is the sum over the ways to write it (`answer_forms`) of the product of the
        probabilities of its tokens, each given the ones before it (teacher forcing), over the whole vocabulary.
        Questions of different length that go through the model together are padded on the left and masked; then sums
        have another order, and equal questions equal answers only up to rounding.

        Args:
            pixels: uint8 [B, H, W, 3].
            queries: The questions.

        Returns:
            For each question the probability of each of its answers.
        """
        seen = {index: self._see(pixels[index]) for index in sorted({query.picture for query in queries})}
        rows = [row for place, query in enumerate(queries) for row in self._rows(place, query, seen[query.picture])]
        found: dict[tuple[int, _Tokens], float] = {}
        with torch.inference_mode():
            for start in range(0, len(rows), self._batch_size):
                part = rows[start : start + self._batch_size]
                for row, log_probabilities in zip(part, self._forward(part), strict=True):
                    for sequence in self._scored_by(row, queries[row.query]):
                        steps = log_probabilities[range(len(sequence)), list(sequence)]
                        found[row.query, sequence] = float(steps.sum().exp())
        return [
            tuple(sum(found[place, sequence] for sequence in self._tokens(answer)) for answer in query.answers)
            for place, query in enumerate(queries)
        ]

    def _see(self, pixels: NDArray[np.uint8]) -> _Picture:
        processor = self._loaded.image_processor
        low, high = self._size
        size = {"shortest_edge": low, "longest_edge": high}
        made = processor([pixels], size=size, input_data_format="channels_last", return_tensors="pt")
        grid = made["image_grid_thw"]
        return _Picture(made["pixel_values"], grid, int(grid.prod()) // processor.merge_size**2)

    def _rows(self, place: int, query: Query, picture: _Picture) -> list[_Row]:
        """The texts of a question: usually one, as a text with an answer's first tokens also shows what begins so."""
        loaded = self._loaded
        content = [{"type": "image"}, {"type": "text", "text": query.question}]
        dialogue = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=loaded.template,
            add_generation_prompt=True,
            tokenize=False,
        )
        text = dialogue.replace(loaded.image_token, loaded.image_token * picture.num_tokens)
        tokens = tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [_Row(place, tokens, forced, picture) for forced in self._forced(query)]

    def _forced(self, query: Query) -> list[_Tokens]:
        starts = {sequence[:-1] for answer in query.answers for sequence in self._tokens(answer)}
        return sorted(start for start in starts if not any(_begins(other, start) for other in starts - {start}))

    def _scored_by(self, row: _Row, query: Query) -> list[_Tokens]:
        sequences = {sequence for answer in query.answers for sequence in self._tokens(answer)}
        return sorted(sequence for sequence in sequences if _begins(row.forced, sequence[:-1]))

    def _tokens(self, answer: str) -> tuple[_Tokens, ...]:
        """The ways to write an answer as tokens, none of them the beginning of another: they exclude each other."""
        if answer not in self._sequences:
            encode = self._loaded.tokenizer.encode
            forms = answer_forms(answer)
            bare = [tuple(encode(form, add_special_tokens=False)) for form in forms]
            spaced = [tuple(encode(f" {form}", add_special_tokens=False)) for form in forms]
            # A space before an answer counts where it is a part of the first word; alone, no model begins with it.
            all_of = {*bare, *(tokens for tokens in spaced if len(tokens) == 1)}
            kept = [one for one in all_of if not any(_begins(one, other) for other in all_of - {one})]
            self._sequences[answer] = tuple(sorted(kept))
        return self._sequences[answer]

    def _forward(self, rows: Sequence[_Row]) -> list[Tensor]:
        """Log-probabilities [F + 1, V] in float64 after the dialogue and after each of the F forced tokens."""
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        texts = [[*row.tokens, *row.forced] for row in rows]
        longest = max(map(len, texts))
        pad = tokenizer.pad_token_id
        padded = torch.tensor([[pad] * (longest - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        num_kept = 1 + max(len(row.forced) for row in rows)
        device = model.device
        answer = model(
            input_ids=padded.to(device),
            attention_mask=mask.to(device),
            # Tells the model where its pictures are, for the positions of their rows and columns.
            mm_token_type_ids=(padded == model.config.image_token_id).long().to(device),
            pixel_values=torch.cat([row.picture.patches for row in rows]).to(device, self._dtype),
            image_grid_thw=torch.cat([row.picture.grid for row in rows]).to(device),
            logits_to_keep=num_kept,
            use_cache=False,
        )
        kept = answer.logits.double().log_softmax(dim=-1)
        return [values[num_kept - 1 - len(row.forced) :] for row, values in zip(rows, kept, strict=True)]

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Fewest and most pixels that a picture is resized to."""
        size = self._loaded.image_processor.size
        low, high = int(size["shortest_edge"]), int(size["longest_edge"])
        high = high if self._max_pixels is None else self._max_pixels
        return min(low, high), high

    @cached_property
    def _loaded(self) -> LoadedVlm:
        return load_vlm(self._reward, self._pretrained, self._revision, self._dtype)


def _begins(tokens: _Tokens, start: _Tokens) -> bool:
    return tokens[: len(start)] == start
