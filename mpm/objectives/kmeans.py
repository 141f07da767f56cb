"""Training of a k-means tokenizer."""

import torch
from torch import Tensor, nn

from mpm.objectives.masked import ObjectiveOutput
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.tokenizers.codebook import code_metrics
from mpm.tokenizers.kmeans import FeatureCodes, PatchCodes

__all__ = ["KMeans"]


class KMeans(nn.Module):
    """Mini-batch k-means (Sculley 2010): no gradients; `after_step` moves the centroids.

    They start from a k-means of the first micro-batch, over all processes.

    Args:
        tokenizer: what is trained.
        seed: of the start, and of what dead codes become.
    """

    def __init__(self, tokenizer: PatchCodes | FeatureCodes, *, seed: int):
        super().__init__()
        self.tokenizer = tokenizer
        self._seed = seed

    @torch.no_grad()
    def forward(self, inputs: TokenizerInputs, progress: Tensor) -> ObjectiveOutput:
        """The mean squared distance to the nearest centroid, per dimension; `progress` is not used.

        Of what has unit variance (normalised patches, features after a norm) it is about 1 where the
        centroids tell nothing. In train mode the first call starts them, and what is assigned to them is kept
        for the next move.
        """
        codebook = self.tokenizer.codebook
        vectors = self.tokenizer.vectors(inputs.images)  # [B,N,D]
        if self.training and not codebook.is_started:
            codebook.start(vectors, seed=self._seed)
        codes = codebook.nearest(vectors)  # [B,N]
        if self.training:
            codebook.accumulate(vectors, codes)
        loss = (vectors - codebook.vectors[codes]).square().mean()
        return ObjectiveOutput(loss, code_metrics(codes, codebook.num_codes))

    def after_step(self, step: int) -> None:
        """Moves the centroids to what was assigned to them in this step, on all processes."""
        self.tokenizer.codebook.move(None, step=step, seed=self._seed)
