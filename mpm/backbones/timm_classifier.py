"""A classifier of timm in the place of a `Classifier`."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TimmClassifier"]


class TimmClassifier(nn.Module):
    """Images to class scores by any model of timm, such as a convolutional one.

    Args:
        backbone: a model of timm with its head.
        head_std: deviation of the head's weights at the start.

    Attributes:
        depth: 0, as its layers are not told apart.

    Raises:
        ValueError: if it has two heads (timm's distilled models).
    """

    depth = 0

    def __init__(self, backbone: Any, *, head_std: float = 0.02):
        super().__init__()
        if not isinstance(backbone.get_classifier(), nn.Module):
            raise ValueError(
                f"timm's {type(backbone).__name__} has a head for each of two tokens; give it as a backbone "
                "instead, such as backbone.variant=deit_ti_distilled"
            )
        self.backbone: Any = backbone
        self.head_std = head_std

    def reset_heads(self) -> None:
        """Start the head: normal with deviation `head_std`, biases 0."""
        for head in self.backbone.get_classifier().modules():
            if isinstance(head, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(head.weight, std=self.head_std)
                if head.bias is not None:
                    nn.init.zeros_(head.bias)

    def vectors(self, images: Tensor) -> Tensor:
        """[B,C,H,W] -> what the head reads, [B,1,D]."""
        features = self.backbone.forward_features(images)
        pooled: Tensor = self.backbone.forward_head(features, pre_logits=True)
        return pooled[:, None]

    def forward(self, images: Tensor) -> Tensor:
        """[B,C,H,W] -> logits [B,1,L]."""
        logits: Tensor = self.backbone(images)
        return logits[:, None]

    def predict(self, images: Tensor) -> Tensor:
        """[B,C,H,W] -> logits [B,L]."""
        return torch.squeeze(self(images), 1)

    @property
    def undecayed(self) -> set[str]:
        """Last parts of the names of parameters that timm says not to decay, such as positions and tokens."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {name.rpartition(".")[2] for name in names}

    def layer_of(self, name: str) -> int:
        """All parameters are of the last layer, depth + 1."""
        return self.depth + 1
