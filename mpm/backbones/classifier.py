"""A backbone, a readout, and a linear head per pooled vector."""

import torch
from torch import Tensor, nn

from mpm.backbones.backbone import Backbone
from mpm.backbones.readouts import Readout

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Images to class scores; never masked.

    Args:
        backbone: the encoder.
        readout: gives Q vectors, each with a head of its own.
        num_classes: L.
        head_std: deviation of the heads' weights at the start.
    """

    def __init__(self, backbone: Backbone, readout: Readout, *, num_classes: int, head_std: float = 0.02):
        super().__init__()
        self.head_std = head_std
        self.backbone = backbone
        self.readout = readout
        self.heads = nn.ModuleList(nn.Linear(backbone.dim, num_classes) for _ in range(readout.num_vectors))

    def reset_heads(self) -> None:
        """Start the heads: normal with deviation `head_std`, biases 0."""
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.trunc_normal_(head.weight, std=self.head_std)
            nn.init.zeros_(head.bias)

    @property
    def depth(self) -> int:
        """Number of blocks of the backbone."""
        return self.backbone.depth

    def vectors(self, images: Tensor) -> Tensor:
        """[B,C,H,W] -> what the heads read, [B,Q,D]."""
        return self.readout(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        """[B,C,H,W] -> logits [B,Q,L]."""
        return self.classify(self.vectors(images))

    def classify(self, vectors: Tensor) -> Tensor:
        """What the heads say of what they read: [B,Q,D] -> logits [B,Q,L]."""
        return torch.stack([head(vectors[:, q]) for q, head in enumerate(self.heads)], dim=1)

    def predict(self, images: Tensor) -> Tensor:
        """[B,C,H,W] -> logits [B,L], the mean over the heads (DeiT's code)."""
        return self(images).mean(1)

    def layer_of(self, name: str) -> int:
        """Depth of a parameter: as in the backbone; readout and heads are depth + 1.

        Raises:
            KeyError: on an unknown name.
        """
        part, _, rest = name.partition(".")
        match part:
            case "backbone":
                return self.backbone.layer_of(rest)
            case "readout" | "heads":
                return self.depth + 1
        raise KeyError(f"{name} is no parameter of a classifier")
