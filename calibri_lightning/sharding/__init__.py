"""Models that do not fit one GPU: the transformer's weights are cut up among ranks, and gathered block by block.

`strategy` is what `trainer.strategy` names; `cut` is what it does to a transformer. Why all ranks of a replica have to
run the same number of forwards, and how they do, is in `sampling.lockstep`.
"""
