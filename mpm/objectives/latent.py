"""Latent targets: the network predicts what an average of itself makes of the hidden patches."""

import copy
import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.backbone import Backbone
from mpm.objectives.masked import MaskedInputs, ObjectiveOutput
from mpm.objectives.predictors import Predictor
from mpm.patchify.masks import PatchMask

__all__ = ["LatentPrediction"]


class LatentPrediction(nn.Module):
    """Predicts the cluster of hidden patches, by an average of the network (CAPI, arXiv:2502.08769).

    The teacher is an exponential moving average of the backbone and sees the whole image. A layer of
    prototypes sorts its patch tokens into clusters; for the targets, Sinkhorn-Knopp makes clusters equally
    full at each place of the grid, over the images of a micro-batch on all processes (at least as many as
    there are clusters, or targets are soft). The same targets train the prototypes and the network.

    Differs from the paper: the predictor is any, its logits are not those of l2-normalised vectors, and the
    prototypes learn at the network's rate. Loss and Sinkhorn-Knopp are lightly's.

    Args:
        backbone: the encoder.
        predictor: encoder output to logits; its width is the number of clusters.
        num_clusters: of the teacher's patch tokens.
        momentum: share of the teacher that is kept in the first step; it rises to 1, a half cosine.
        teacher_temperature: of the logits that become targets.
        student_temperature: of the logits that are trained, prototypes' and predictor's.
        sinkhorn_iterations: of the balancing.
    """

    def __init__(
        self,
        backbone: Backbone,
        predictor: Predictor,
        *,
        num_clusters: int,
        momentum: float = 0.99,
        teacher_temperature: float = 0.06,
        student_temperature: float = 0.12,
        sinkhorn_iterations: int = 3,
    ):
        from lightly.loss.capi_loss import CAPILoss

        super().__init__()
        self.backbone = backbone
        self.predictor = predictor
        self.teacher = copy.deepcopy(backbone).requires_grad_(False).eval()
        self.prototypes = nn.Linear(backbone.dim, num_clusters)
        nn.init.normal_(self.prototypes.weight)
        nn.init.zeros_(self.prototypes.bias)
        self._loss = CAPILoss(
            teacher_temperature, student_temperature, sinkhorn_iterations, gather_distributed=True
        )
        self._first_momentum = momentum
        self._momentum = torch.ones(())

    def reset_teacher(self) -> None:
        """Make the teacher the backbone as it is; to be called when the backbone has its start values."""
        self.teacher.load_state_dict(self.backbone.state_dict())

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def predict(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Normalised images [B,C,H,W] -> logits [S,B,M,K]."""
        token = self.predictor.encoder_mask_token
        tokens = self.backbone.embed(images, mask, token)
        if token is None:
            encoded = self.backbone.encode(tokens, at=mask.visible, layers=self.predictor.layers)
        else:
            read = mask.masked if self.predictor.reads == "masked" else None
            encoded = self.backbone.encode(tokens, read=read, layers=self.predictor.layers)
        return self.predictor(encoded, mask)

    def forward(self, inputs: MaskedInputs, progress: Tensor) -> ObjectiveOutput:
        """The losses of network and prototypes, each a mean over patches; `inputs.targets` is not used."""
        self._momentum = self.momentum_at(progress)
        with torch.no_grad():
            patches = self.teacher(inputs.images).patches.float()  # [B,N,D]
            patches = F.normalize(F.layer_norm(patches, patches.shape[-1:]), dim=-1)
        clusters = self.prototypes(patches).float()  # [B,N,K]
        clustering = self._loss(clusters, clusters)
        predictions = self.predict(inputs.images, inputs.mask).float()
        prediction = torch.stack([self._loss(clusters, p, inputs.mask.masked) for p in predictions]).sum()
        metrics = {"prediction": prediction.detach(), "clustering": clustering.detach()}
        return ObjectiveOutput(prediction + clustering, metrics)

    def momentum_at(self, progress: Tensor) -> Tensor:
        """Share of the teacher that is kept: [] from the start's to 1."""
        return 1 - (1 - self._first_momentum) * (1 + torch.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The teacher follows the backbone."""
        share = 1 - self._momentum
        for average, parameter in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
            average.lerp_(parameter, share)
        for average, buffer in zip(self.teacher.buffers(), self.backbone.buffers(), strict=True):
            average.copy_(buffer)
