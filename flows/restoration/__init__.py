"""Inverse problems: draw what an incomplete or noisy observation was made of, with a trained flow as the prior."""

from flows.restoration.operators import Denoising, Downsampling, Inpainting, Operator
from flows.restoration.posterior import Restoration, restore

__all__ = ["Denoising", "Downsampling", "Inpainting", "Operator", "Restoration", "restore"]
