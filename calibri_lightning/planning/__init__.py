"""What a run will need, found out before anything is loaded."""

from calibri_lightning.planning.estimate import MemoryPlan, NetworkSize, Situation, make_plan
from calibri_lightning.planning.sketch import sketch_pipeline

__all__ = ["MemoryPlan", "NetworkSize", "Situation", "make_plan", "sketch_pipeline"]
