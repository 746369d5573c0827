"""Adapters: LoRAs on transformers, the policy that a run trains, and their files."""

from calibri_lightning.adapters.files import ADAPTER, AdapterRecord, adapter_digest, read_adapter, write_adapter
from calibri_lightning.adapters.full import TRANSFORMER, load_transformer, write_transformer
from calibri_lightning.adapters.loading import adapter_folder, find_adapter, load_adapter
from calibri_lightning.adapters.lora import LoraOptions, add_lora, remove_lora, without_lora
from calibri_lightning.adapters.policy import BASE, LIVE, Policy, Trains

__all__ = [
    "ADAPTER",
    "BASE",
    "LIVE",
    "TRANSFORMER",
    "AdapterRecord",
    "LoraOptions",
    "Policy",
    "Trains",
    "adapter_digest",
    "adapter_folder",
    "add_lora",
    "find_adapter",
    "load_adapter",
    "load_transformer",
    "read_adapter",
    "remove_lora",
    "without_lora",
    "write_adapter",
    "write_transformer",
]
