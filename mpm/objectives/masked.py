"""Masked-patch prediction: backbone x predictor x target x loss."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from mpm.backbones.backbone import Backbone
from mpm.objectives.predictors import Predictor
from mpm.patchify.masks import PatchMask

__all__ = ["MaskedInputs", "MaskedPrediction", "ObjectiveOutput"]


class ObjectiveOutput(NamedTuple):
    """What an objective gives for a micro-batch.

    Attributes:
        loss: scalar.
        metrics: scalars, detached, on the device.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class MaskedInputs(NamedTuple):
    """What `prepare` gives to a masked objective.

    Attributes:
        images: normalised, float32 [B,C,H,W].
        mask: which patches are hidden.
        targets: float32 [B,M,F].
    """

    images: Tensor
    mask: PatchMask
    targets: Tensor


class MaskedPrediction(nn.Module):
    """Predicts what was hidden (MAE, SimMIM, BEiT: which one follows from the parts).

    A predictor without an encoder mask token drops masked patches; with one, it stands in their place.

    Args:
        backbone: the encoder.
        predictor: encoder output to predictions at masked patches.
        loss: (predictions [S,B,M,F], targets [S,B,M,F]) -> [S,B,M].
    """

    def __init__(self, backbone: Backbone, predictor: Predictor, *, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.backbone = backbone
        self.predictor = predictor
        self._loss = loss

    def predict(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Normalised images [B,C,H,W] -> predictions [S,B,M,F]."""
        token = self.predictor.encoder_mask_token
        tokens = self.backbone.embed(images, mask, token)
        if token is None:
            encoded = self.backbone.encode(tokens, at=mask.visible)
        else:
            encoded = self.backbone.encode(
                tokens, read=mask.masked if self.predictor.reads == "masked" else None
            )
        return self.predictor(encoded, mask)

    def forward(self, inputs: MaskedInputs, progress: Tensor) -> ObjectiveOutput:
        """The mean over masked patches, summed over the S predictions; `progress` is not used."""
        predictions = self.predict(inputs.images, inputs.mask)
        losses = self._loss(predictions, inputs.targets.expand_as(predictions))  # [S,B,M]
        return ObjectiveOutput(losses.mean((1, 2)).sum(), {})

    def after_step(self, step: int) -> None:
        """Nothing moves but by the optimizer."""
