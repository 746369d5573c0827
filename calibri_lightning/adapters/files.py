"""The files of an adapter, in peft's format: `adapter_config.json` and `adapter_model.safetensors`, never a pickle.

`peft.PeftModel.from_pretrained(transformer, folder)` reads what is written here, and what peft wrote is read here.
diffusers' own `pipe.load_lora_weights` takes no such folder, and says so in its log alone; and whoever hands the
numbers to diffusers without the configuration loses alpha. So nothing is read without it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibri_lightning.adapters.lora import lora_parameters
from calibri_lightning.atomic import replacing
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "adapter"
"""What a run calls the folder of its adapter."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_STRENGTH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""What a configuration says about the size of the updates."""
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
"""Starts (`init_lora_weights`) that leave the base model's weights alone."""


@dataclass(frozen=True)
class AdapterRecord:
    """The adapter that something was made with."""

    source: str
    """Folder or Hub id, as given."""
    sha256: str
    """`adapter_digest` of it."""
    merged: bool = False
    """Whether it was merged into the weights."""


@dataclass(frozen=True)
class AdapterFile:
    """What the files of an adapter say."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    """By name of layer and matrix: "transformer_blocks.0.attn.to_q.lora_A.weight"."""

    @property
    def digest(self) -> str:
        """What `adapter_digest` says of it."""
        return _digest(self.tensors, self.config)


def write_adapter(
    folder: str | Path, transformer: nn.Module, tensors: Mapping[str, Tensor] | None = None, base_model: str = ""
) -> str:
    """Writes the LoRA of a transformer; each file is replaced whole.

    Args:
        folder: Where to; it is made if it is not there.
        transformer: The transformer.
        tensors: Other numbers for the LoRA, by the parameters' names (`Policy.tensors`); what is no part of the LoRA is
            left out. The live ones if None.
        base_model: Folder or Hub id of the model it belongs to; for people.

    Returns:
        Its digest, as `adapter_digest` gives it.

    Raises:
        UserError: If the transformer has no LoRA, tensors are missing, or the folder cannot be written.
    """
    from safetensors.torch import save

    adapter, config = _only_adapter(transformer)
    live = lora_parameters(transformer)
    source = live if tensors is None else tensors
    missing = sorted(live.keys() - source.keys())
    if missing:
        raise UserError(f"The adapter to write has no {missing[0]}. Give all tensors of the LoRA.")
    held = {_key(name, adapter): source[name].detach().cpu().contiguous() for name in live}
    document = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    document |= {"inference_mode": True, "base_model_name_or_path": base_model or None}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS) as temporary:
            temporary.write_bytes(save({_PREFIX + key: tensor for key, tensor in held.items()}, {"format": "pt"}))
        with replacing(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The adapter cannot be written to {folder} ({error.strerror or error}). Free space, or choose a folder "
            "that you may write to."
        ) from error
    return _digest(held, config)


def read_adapter(folder: str | Path) -> AdapterFile:
    """Reads and checks the files of an adapter.

    Args:
        folder: The folder that holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        What they say.

    Raises:
        UserError: If one is absent, damaged, or says what a plain LoRA does not.
    """
    folder = Path(folder)
    return AdapterFile(_read_config(folder), _read_tensors(folder))


def adapter_digest(source: nn.Module | str | Path) -> str:
    """Tells adapters apart: by all their numbers, and how strongly they act.

    Args:
        source: A transformer with one LoRA, or the folder of an adapter; the type of the numbers does not matter.

    Returns:
        sha256 in hexadecimal digits.

    Raises:
        UserError: If there is no adapter, or several.
    """
    if isinstance(source, str | Path):
        return read_adapter(source).digest
    adapter, config = _only_adapter(source)
    return _digest({_key(name, adapter): tensor for name, tensor in lora_parameters(source).items()}, config)


def live_name(key: str, adapter: str) -> str:
    """Names the parameter of a transformer that a file's tensor belongs to.

    Args:
        key: The tensor's name, as in `AdapterFile.tensors`.
        adapter: What the adapter is called inside peft.

    Returns:
        The parameter's name.
    """
    layer, _, leaf = key.rpartition(".")
    return f"{layer}.{adapter}.{leaf}"


def _key(name: str, adapter: str) -> str:
    layer, _, leaf = name.rpartition(f".{adapter}.")
    return f"{layer}.{leaf}"


def _only_adapter(transformer: nn.Module) -> tuple[str, LoraConfig]:
    """Name and configuration of the one LoRA of a transformer."""
    held: Mapping[str, Any] = dict(getattr(transformer, "peft_config", {}))
    if len(held) != 1:
        raise UserError(
            f"This {type(transformer).__name__} has {len(held) or 'no'} adapters. The rule is one: add_lora or "
            "load_adapter put it there."
        )
    return next(iter(held.items()))


def _digest(tensors: Mapping[str, Tensor], config: LoraConfig) -> str:
    strength = {name: getattr(config, name) for name in _STRENGTH}
    strength["lora_alpha"] = float(strength["lora_alpha"])
    found = hashlib.sha256(json.dumps(strength, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()


def _read_config(folder: Path) -> LoraConfig:
    from peft import LoraConfig

    path = folder / CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {CONFIG}, without which nobody knows the adapter's alpha. Give the folder as peft's "
            "save_pretrained wrote it."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Copy or download it again.") from error
    if not isinstance(document, dict) or document.get("peft_type") != "LORA":
        kind = document.get("peft_type") if isinstance(document, dict) else document
        raise UserError(f"{path} is of an adapter of type {kind!r}. The rule is a LoRA as peft saves it (LORA).")
    rank, alpha = document.get("r"), document.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{path} has r {rank!r}. The rank is a whole number of at least 1: use the original file.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(
            f"{path} has lora_alpha {alpha!r}, and without a number there the adapter's strength is unknown: any guess "
            "gives other pictures. Use the original file, or write in what the training used."
        )
    known = {field.name for field in fields(LoraConfig)}
    wrong = sorted(key for key, value in document.items() if value and (key not in known or key in _MORE_THAN_LORA))
    wrong += ["bias"] if document.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if document.get("init_lora_weights", True) not in _PLAIN_STARTS else []
    if wrong:
        raise UserError(
            f"{path} says {wrong[0]}: {document[wrong[0]]!r}, which is more than a plain LoRA. Merge it into the model "
            "with the tool that made it, and give the merged model as model.backbone's pretrained."
        )
    # Of no effect on what was trained: dropout is for training, and the start is over.
    settled = {"lora_dropout": 0.0, "init_lora_weights": True, "inference_mode": True}
    return LoraConfig(**{key: value for key, value in document.items() if key in known} | settled)


_MORE_THAN_LORA = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "megatron_config",
)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        why = f"It has {pickled[0]}, a pickle, which can run any code and is never opened. " if pickled else ""
        raise UserError(
            f"{folder} has no {WEIGHTS}. {why}Save the adapter with peft's save_pretrained(folder, "
            "safe_serialization=True), its default."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}). Copy or download it again.") from error
    if not tensors:
        raise UserError(f"{path} holds no tensor. Copy or download it again.")
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
