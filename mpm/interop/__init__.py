"""Weights that others trained, and ours for others."""

from mpm.interop.official import load_official

__all__ = ["load_official"]
