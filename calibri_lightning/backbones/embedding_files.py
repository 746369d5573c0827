"""Embeddings of texts on disk, so that no later run encodes a text again.

A file is named by a digest of what made the embedding and of the text. What made it is told by content, not by a
name: a few values of every parameter of the text encoders, the tokenizers whole, the pipeline's settings, the type of
numbers and of device, and the versions of the libraries that hold the templates. Hashing all bytes of the encoders
would take longer than encoding some hundred prompts; a fine-tune changes nearly every parameter, so a few values of
each tell it apart. A repository's name and revision would say nothing of a local folder.

Files are safetensors with a checksum of their tensors, written under another name and renamed: any number of processes
may share a folder. A file that is damaged or belongs to something else is never used; it is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.calibration.fingerprint import weights_digest
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

_log = logging.getLogger(__name__)

_FORMAT = "calibri_lightning embedding 1"


class EmbeddingFiles:
    """The embeddings of one model in a folder."""

    def __init__(self, folder: Path, model: str) -> None:
        """Opens a folder, which is made where it is absent.

        Args:
            folder: The folder; several models and processes may share it.
            model: What `encoder_digest` says of the model.

        Raises:
            UserError: If the folder cannot be written.
        """
        self.folder, self._model, self._writes = folder / model[:16], model, True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"\0")
        except OSError as error:
            raise UserError(
                f"memory.embedding_cache is {folder}, which cannot be written ({error.strerror or error}). Give a "
                "folder that you may write to, or leave embedding_cache out."
            ) from error

    def path(self, text: str) -> Path:
        """Where the embedding of a text is.

        Args:
            text: What the text encoders read.

        Returns:
            The file, whether it exists or not.
        """
        return self.folder / f"{_sha256(self._model, text)}.safetensors"

    def load(self, text: str) -> Conditioning | None:
        """Reads the embedding of a text.

        Args:
            text: What the text encoders read.

        Returns:
            The embedding, on the CPU; None where there is none, or none that can be trusted.
        """
        path = self.path(text)
        if not path.is_file():
            return None
        try:
            tensors, header = _read(path)
        except Exception as error:  # a damaged file surfaces as one of many classes
            return self._distrust(path, f"it is damaged ({type(error).__name__})")
        if header.get("format") != _FORMAT or header.get("key") != path.stem:
            return self._distrust(path, "it is of another model, text or program")
        if header.get("checksum") != _checksum(tensors):
            return self._distrust(path, "its tensors have changed")
        lengths = json.loads(header["lengths"])
        return Conditioning(tensors, None if lengths is None else tuple(lengths))

    @staticmethod
    def _distrust(path: Path, reason: str) -> None:
        _log.warning("The cached embedding %s is not used: %s. The text is encoded again.", path, reason)

    def save(self, text: str, embedding: Conditioning) -> None:
        """Writes the embedding of a text; a folder that has become full or read-only is given up with a warning.

        Args:
            text: What the text encoders read.
            embedding: A conditioning of one row, on the CPU.
        """
        if not self._writes:
            return
        from safetensors.torch import save

        path, tensors = self.path(text), {name: t.contiguous() for name, t in embedding.tensors.items()}
        lengths = None if embedding.lengths is None else list(embedding.lengths)
        header = {"format": _FORMAT, "key": path.stem, "checksum": _checksum(tensors), "lengths": json.dumps(lengths)}
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(save(tensors, header))
            os.replace(temporary, path)
        except OSError as error:
            self._writes = False
            temporary.unlink(missing_ok=True)
            _log.warning("No more embeddings are kept in %s: %s.", self.folder, error.strerror or error)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Digest of all bytes; safetensors itself checks no more than the file's length."""
    import torch

    mixer = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        mixer.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        mixer.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return mixer.hexdigest()


def _sha256(*parts: str) -> str:
    mixer = hashlib.sha256()
    for part in parts:
        data = part.encode()
        mixer.update(len(data).to_bytes(8, "big") + data)
    return mixer.hexdigest()


def encoder_digest(pipe: DiffusionPipeline, encoders: nn.ModuleList, dtype: torch.dtype, device: torch.device) -> str:
    """Digest of all that an embedding depends on besides its text.

    Args:
        pipe: The pipeline.
        encoders: Its text encoders.
        dtype: Type of the embeddings.
        device: Where texts are encoded: last bits differ between kinds of devices.

    Returns:
        64 hexadecimal digits.
    """
    settings = {key: value for key, value in dict(pipe.config).items() if key != "_name_or_path"}
    versions = {name: metadata.version(name) for name in ("diffusers", "transformers")}
    tokenizers = [
        _tokenizer_content(getattr(part, "tokenizer", part))
        for name, part in sorted(pipe.components.items())
        if name.startswith(("tokenizer", "processor")) and part is not None
    ]
    weights = weights_digest(encoders) if len(encoders) else ""
    described = [type(pipe).__name__, settings, versions, str(dtype), device.type, weights, tokenizers]
    return _sha256(json.dumps(described, sort_keys=True, default=str))


def _tokenizer_content(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else tokenizer.get_vocab(),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.model_max_length,
        tokenizer.padding_side,
        getattr(tokenizer, "chat_template", None),
    ]
