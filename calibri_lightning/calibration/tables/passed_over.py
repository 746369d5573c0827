"""Modules in which nothing is scaled, on purpose."""

from __future__ import annotations

from calibri_lightning.calibration.sites import pass_over

pass_over(
    "added by an IP-adapter, no part of the model",
    "ImageProjection",
    "IPAdapterTimeImageProjection",
    "IPAdapterTimeImageProjectionBlock",
)
pass_over(
    "a projection of the prompt or of an image, outside of all blocks (GLM-Image, Wan)",
    "FeedForward",
)
pass_over(
    "projects the prompt's embeddings, a layer for each block (FIBO, HiDream)",
    "BriaFiboTextProjection",
    "TextProjection",
)
pass_over("makes the gates of all blocks (Chroma)", "ChromaApproximator")
pass_over("sums up the prompt before the first block (FIBO 2)", "BriaFibo2PerceiverResampler")
pass_over("mixes the text encoder's layers, as a batch of rows times tokens (Krea 2)", "Krea2TextFusion")
