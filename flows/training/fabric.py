"""Lightning Fabric, from whichever of its two packages is installed."""

from __future__ import annotations

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:
    from lightning.fabric import Fabric

__all__ = ["Fabric"]
