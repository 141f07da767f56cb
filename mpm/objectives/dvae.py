"""Training of a discrete variational autoencoder."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.objectives.masked import ObjectiveOutput
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.tokenizers.codebook import code_metrics
from mpm.tokenizers.dvae import DiscreteVAE

__all__ = ["DVAETraining", "anneal", "divergence_from_uniform", "gumbel_softmax"]


class DVAETraining(nn.Module):
    """Reconstruction through relaxed codes (arXiv:2102.12092 2.1; the loss of DALLE-pytorch and BEiT's code).

    loss = reconstruction + kl_weight * kl. The reconstruction is a mean over the normalised pixels. The `kl`
    is of the codes' probabilities from equal ones, in nats, a mean over images and positions: 0 where all
    codes are equally likely, ln V where one is certain. DALLE-pytorch and BEiT sum over images and positions
    (their `batchmean` divides by 1), so that their weight is ours divided by B N.

    Args:
        tokenizer: what is trained.
        loss: of the reconstruction.
        temperature: of the samples, by the progress [] of the run.
        kl_weight: by the progress [] of the run.
        straight_through: one-hot samples forward, soft ones backward.
    """

    def __init__(
        self,
        tokenizer: DiscreteVAE,
        *,
        loss: Literal["l2", "smooth_l1"],
        temperature: Callable[[Tensor], Tensor],
        kl_weight: Callable[[Tensor], Tensor],
        straight_through: bool,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self._distance = F.mse_loss if loss == "l2" else F.smooth_l1_loss
        self._temperature = temperature
        self._kl_weight = kl_weight
        self._straight_through = straight_through

    def forward(self, inputs: TokenizerInputs, progress: Tensor) -> ObjectiveOutput:
        """The noise is of the device's generator. Probabilities and losses are float32 in autocast too."""
        tokenizer, images = self.tokenizer, inputs.images
        logits = tokenizer.logits(images).float()  # [B,V,h,w]
        temperature = self._temperature(progress)
        samples = gumbel_softmax(logits, temperature, straight_through=self._straight_through)
        vectors = torch.einsum("bvhw,vd->bdhw", samples, tokenizer.codebook.weight)
        told = tokenizer.reconstruct(vectors).float()
        reconstruction = self._distance(told, tokenizer.normalize(images))
        kl = divergence_from_uniform(logits)
        loss = reconstruction + self._kl_weight(progress) * kl
        metrics = {
            "reconstruction": reconstruction.detach(),
            "kl": kl.detach(),
            **code_metrics(logits.detach().argmax(1), tokenizer.vocab_size),
        }
        return ObjectiveOutput(loss, metrics, {"temperature": temperature})

    def after_step(self, step: int) -> None:
        """Nothing moves but by the optimizer."""


def gumbel_softmax(logits: Tensor, temperature: Tensor, *, straight_through: bool) -> Tensor:
    """Relaxed samples (arXiv:1611.01144): logits [B,V,h,w] -> [B,V,h,w], sum 1 over V."""
    gumbel = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + gumbel) / temperature).softmax(1)
    if not straight_through:
        return soft
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1)
    return hard + soft - soft.detach()


def divergence_from_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits [B,V,h,w]) from equal probabilities, in nats, mean over B, h and w: []."""
    log_probabilities = logits.log_softmax(1)
    negative_entropy = (log_probabilities.exp() * log_probabilities).sum(1)  # [B,h,w]
    return negative_entropy.mean() + math.log(logits.shape[1])


def anneal(progress: Tensor, *, start: float, end: float, share: float) -> Tensor:
    """From start to end over a share of the run, a half cosine, then end; progress [] in [0,1)."""
    done = (progress / share).clamp(max=1)
    return end + (start - end) * (1 + torch.cos(math.pi * done)) / 2
