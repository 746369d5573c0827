"""How parameters are improved: interchangeable strategies that share one base."""

from __future__ import annotations

from calibri_lightning.strategies.alternate import Alternate
from calibri_lightning.strategies.base import BestVector, CalibratedModule, Strategy
from calibri_lightning.strategies.budget import StopRules
from calibri_lightning.strategies.cma_es import CMAES
from calibri_lightning.strategies.diffusion_nft import DiffusionNFT
from calibri_lightning.strategies.evolution import EvolutionStrategy
from calibri_lightning.strategies.flow_grpo import FlowGRPO
from calibri_lightning.strategies.pair_es import PairES
from calibri_lightning.strategies.phases import Phase
from calibri_lightning.strategies.rounds import GenerationReport

__all__ = [
    "CMAES",
    "Alternate",
    "BestVector",
    "CalibratedModule",
    "DiffusionNFT",
    "EvolutionStrategy",
    "FlowGRPO",
    "GenerationReport",
    "PairES",
    "Phase",
    "StopRules",
    "Strategy",
]
