"""Embeddings of texts: encoded once in the life of a backbone, or found on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.embedding_files import EmbeddingFiles, encoder_digest
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from calibri_lightning.backbones.base import Backbone


class Embeddings:
    """The embeddings of one backbone, on the CPU, and where its text encoders are meanwhile."""

    def __init__(self, backbone: Backbone) -> None:
        """Starts empty.

        Args:
            backbone: Encodes what is not known; its memory options say from which device and folder.
        """
        self.known: dict[str, Conditioning] = {}
        self._backbone = backbone
        self._files: EmbeddingFiles | None = None
        self._dropped = False

    def rows(self, phrases: Sequence[str]) -> Conditioning:
        """Gives the embeddings of texts.

        Args:
            phrases: What the text encoders read; they may repeat.

        Returns:
            One row a text, in order, on the transformer's device.

        Raises:
            UserError: If the text encoders are needed and gone, or do not fit into the memory of the device.
        """
        unique = {phrase: row for row, phrase in enumerate(dict.fromkeys(phrases))}
        self._fill(list(unique))
        rows = Conditioning.cat([self.known[phrase] for phrase in unique]).to(self._backbone.device)
        return rows if len(unique) == len(phrases) else rows.take([unique[phrase] for phrase in phrases])

    def drop_encoders(self, phrases: Sequence[str]) -> None:
        """Encodes texts and removes the text encoders for good; a second call only checks that all texts are known.

        Args:
            phrases: All texts that will be asked for.

        Raises:
            UserError: If the encoders are gone already and a text is new, or this backbone needs to keep them.
        """
        self._fill(list(dict.fromkeys(phrases)))
        if not self._dropped:
            self._backbone.drop_text_encoders()
            self._dropped = True

    def _fill(self, phrases: Sequence[str]) -> None:
        missing = [phrase for phrase in phrases if phrase not in self.known]
        files = self._open_files() if missing else None
        for phrase in missing if files is not None else ():
            found = files.load(phrase) if files is not None else None
            if found is not None:
                self.known[phrase] = found
        missing = [phrase for phrase in missing if phrase not in self.known]
        if not missing:
            return
        self._fetch_encoders(missing[0])
        for phrase in missing:
            self.known[phrase] = self._backbone.encode_text(phrase).to("cpu")
            if files is not None:
                files.save(phrase, self.known[phrase])
        if self._backbone.memory.text_encoders in ("offload", "drop"):
            self._backbone.release_text_encoders()

    def _open_files(self) -> EmbeddingFiles | None:
        backbone, folder = self._backbone, self._backbone.memory.embedding_cache
        if folder is not None and self._files is None and not self._dropped:
            digest = encoder_digest(backbone.pipeline, backbone.text_encoders(), backbone.dtype, self._device())
            self._files = EmbeddingFiles(Path(folder), digest)
        return self._files

    def _device(self) -> torch.device:
        """Where texts are encoded."""
        return torch.device("cpu") if self._backbone.memory.text_encoders == "cpu" else self._backbone.device

    def _fetch_encoders(self, phrase: str) -> None:
        if self._dropped:
            raise UserError(
                f"The text {phrase[:80]!r} has no embedding, and the text encoders were removed when the run started "
                "(memory.text_encoders: drop). Name all prompts in the data, or use text_encoders: offload."
            )
        device = self._device()
        try:
            self._backbone.text_encoders().to(device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"The text encoders do not fit beside the transformer into the memory of {device}. Encode on the CPU "
                "with memory.text_encoders: cpu; an embedding_cache spares later runs the wait."
            ) from error
