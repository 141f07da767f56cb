"""Masked-patch prediction: backbone x predictor x target x loss."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpm.backbones.backbone import Backbone
from mpm.objectives.predictors import Predictor
from mpm.patchify.masks import PatchMask

__all__ = ["MaskedInputs", "MaskedPrediction", "ObjectiveOutput", "predict"]


class ObjectiveOutput(NamedTuple):
    """What an objective gives for a micro-batch.

    Attributes:
        loss: scalar.
        metrics: scalars, detached, on the device, whose means over steps are told.
        settings: scalars that follow from the progress; those of a step are told, as its rate is.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    settings: Mapping[str, Tensor] = MappingProxyType({})


class MaskedInputs(NamedTuple):
    """What `prepare` gives to a masked objective.

    Attributes:
        images: normalised, float32 [B,C,H,W].
        mask: which patches are hidden.
        targets: float32 [B,M,F], or codes int64 [B,M]; empty where the objective makes its own.
    """

    images: Tensor
    mask: PatchMask
    targets: Tensor


def predict(backbone: Backbone, predictor: Predictor, images: Tensor, mask: PatchMask) -> Tensor:
    """Normalised images [B,C,H,W] -> predictions [S,B,M,F]; the trunk sees what the predictor asks for."""
    token = predictor.encoder_mask_token
    tokens = backbone.embed(images, mask, token)
    if token is None:
        encoded = backbone.encode(tokens, at=mask.visible, layers=predictor.layers)
    else:
        read = mask.masked if predictor.reads == "masked" else None
        encoded = backbone.encode(tokens, read=read, layers=predictor.layers)
    return predictor(encoded, mask)


class MaskedPrediction(nn.Module):
    """Predicts what was hidden (MAE, SimMIM, BEiT: which one follows from the parts).

    A predictor without an encoder mask token drops masked patches; with one, it stands in their place.

    Args:
        backbone: the encoder.
        predictor: encoder output to predictions at masked patches.
        loss: (predictions [S,B,M,F], targets [S,B,M,F] or codes [S,B,M]) -> [S,B,M].
    """

    def __init__(self, backbone: Backbone, predictor: Predictor, *, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.backbone = backbone
        self.predictor = predictor
        self._loss = loss

    def predict(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Normalised images [B,C,H,W] -> predictions [S,B,M,F]."""
        return predict(self.backbone, self.predictor, images, mask)

    def forward(self, inputs: MaskedInputs, progress: Tensor) -> ObjectiveOutput:
        """The mean over masked patches, summed over the S predictions; `progress` is not used.

        Of codes, `code_accuracy` is the share that the first prediction gets right.
        """
        predictions = self.predict(inputs.images, inputs.mask)
        targets = inputs.targets.expand(len(predictions), *inputs.targets.shape)
        losses = self._loss(predictions, targets)  # [S,B,M]
        metrics = {}
        if not targets.is_floating_point():
            with torch.no_grad():
                metrics["code_accuracy"] = (predictions[0].argmax(-1) == targets[0]).float().mean()
        return ObjectiveOutput(losses.mean((1, 2)).sum(), metrics)

    def after_step(self, step: int) -> None:
        """Nothing moves but by the optimizer."""
