"""Masked-patch pretraining of vision transformers, and fine-tuning of what it gives."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpm.network import Network, load

__all__ = ["Network", "__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch only when a network is asked for."""
    if name in ("Network", "load"):
        from mpm import network

        return getattr(network, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
