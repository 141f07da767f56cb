"""Vision transformers as compositions: blocks, backbones, readouts, classifiers."""

from mpm.backbones.create import create_backbone, create_classifier, variants
from mpm.backbones.fold import fold

__all__ = ["create_backbone", "create_classifier", "fold", "variants"]
