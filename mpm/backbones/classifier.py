"""A backbone, a readout, and a linear head per pooled vector."""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor, nn

from mpm.backbones.backbone import Backbone
from mpm.backbones.readouts import Readout
from mpm.patchify.norms import TokenBatchNorm

__all__ = ["Classifier", "fold_head_norms"]

_NORM_EPSILON = 1e-6  # MAE's main_linprobe.py


class Classifier(nn.Module):
    """Images to class scores; never masked.

    Args:
        backbone: the encoder.
        readout: gives Q vectors, each with a head of its own.
        num_classes: L.
        head_std: deviation of the heads' weights at the start.
        head_norm: "none", or "batch": batch norm without weights before each head, over all processes (MAE's
            linear probe).

    Attributes:
        stays_in_eval_mode: parts that do, whatever the rest is set to (see `tune`).
        trains_in_eval_mode: whether all of it stays in eval mode: no drop path, batch norm by its running
            statistics (DeiT's fine-tuning at 384 pixels).
    """

    def __init__(
        self,
        backbone: Backbone,
        readout: Readout,
        *,
        num_classes: int,
        head_std: float = 0.02,
        head_norm: Literal["none", "batch"] = "none",
    ):
        super().__init__()
        self.head_std = head_std
        self.backbone = backbone
        self.readout = readout
        self.head_norms = nn.ModuleList(
            TokenBatchNorm(backbone.dim, eps=_NORM_EPSILON, affine=False)
            if head_norm == "batch"
            else nn.Identity()
            for _ in range(readout.num_vectors)
        )
        self.heads = nn.ModuleList(nn.Linear(backbone.dim, num_classes) for _ in range(readout.num_vectors))
        self.stays_in_eval_mode: list[nn.Module] = []
        self.trains_in_eval_mode = False

    def train(self, mode: bool = True) -> Self:
        """Set the mode of every part but those that stay in eval mode."""
        super().train(mode and not self.trains_in_eval_mode)
        for part in self.stays_in_eval_mode:
            part.eval()
        return self

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
        heads = zip(vectors.unbind(1), self.head_norms, self.heads, strict=True)
        return torch.stack([head(norm(vector)) for vector, norm, head in heads], dim=1)

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


def fold_head_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a classifier without norms before its heads that gives the same logits in eval mode.

    Exact: with fixed statistics W (x - m) / s + b = (W / s) x + (b - W m / s).

    Args:
        state: of a `Classifier`, or of a module that holds one.
    """
    folded = {name: tensor for name, tensor in state.items() if "head_norms." not in name}
    for name, mean in state.items():
        before, norms, rest = name.rpartition("head_norms.")
        number, _, leaf = rest.partition(".")
        if norms and leaf == "running_mean":
            head = f"{before}heads.{number}"
            variance = state[f"{before}head_norms.{number}.running_var"]
            weight = state[f"{head}.weight"] * torch.rsqrt(variance + _NORM_EPSILON)
            folded[f"{head}.weight"] = weight
            folded[f"{head}.bias"] = state[f"{head}.bias"] - weight @ mean
    return folded
