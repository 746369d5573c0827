"""Adapters: LoRAs on transformers, the policy that a run trains, and their files."""

from calibri_lightning.adapters.lora import LoraOptions, add_lora
from calibri_lightning.adapters.policy import Policy, Trains

__all__ = ["LoraOptions", "Policy", "Trains", "add_lora"]
