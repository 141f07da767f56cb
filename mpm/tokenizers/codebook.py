"""A codebook: V vectors that follow what is assigned to them, outside the optimizer."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm import distributed
from mpm.tokenizers import clustering
from mpm.tokenizers.clustering import Metric

__all__ = ["Codebook", "Metric", "Quantized", "code_metrics"]

_SAMPLES_PER_CODE = 256  # more of them move no start
_IDLE_PER_CODE = 300  # see Codebook
_MOST_REVIVED = 1024  # in a step


class Quantized(NamedTuple):
    """Vectors in the place of what was quantised.

    Attributes:
        vectors: of the codes, float32 [...,D]; their gradient is that of the input (straight through).
        codes: int64 [...].
    """

    vectors: Tensor
    codes: Tensor


class Codebook(nn.Module):
    """V vectors, started by k-means and moved by what is assigned to them.

    Its life: `start` on the first batch; then for each step `accumulate` on each micro-batch and `move` once.
    Everything is computed in float32 or more, also under autocast. Sums are taken in float64, so that the
    vectors do not depend on how a batch is spread over micro-batches and processes; no result depends on the
    order of the rows.

    **Move.** n vectors with sum s are assigned to a code v in a step; a code with none keeps its vector.

    | metric | decay | count N becomes | v becomes |
    |---|---|---|---|
    | euclidean | None | N + n | v + (s - n v) / N |
    | euclidean | g | g N + (1 - g) n | v + (1 - g) (s - n v) / N |
    | cosine | None | N + n | unit(v + (s - n v) / N) |
    | cosine | g | g N + (1 - g) n | unit(g v + (1 - g) unit(s)) |

    They are mini-batch k-means (Sculley 2010, Alg. 1: the rate of a code is one over its count), the moving
    averages of VQ-VAE (arXiv:1711.00937, App. A.1, without smoothing: a code begins at the mean of its first
    vectors), a spherical variant of mini-batch k-means, and BEiT v2's codebook (arXiv:2208.06366, released
    code).

    **Dead codes.** A code that none of the last 300 V vectors chose is moved to a vector of this step, its
    count set to 0. The average code is chosen by 300 of them; one that is used a hundredth as often is taken
    for dead in 1 of 20 such spans, one used a thirtieth as often in 1 of 20,000. The new vectors are drawn as
    k-means++ draws, in proportion to the squared distance from the nearest code, without repetition, from
    1024 vectors of the step. None of the sources does this; BEiT v2 leaves unused codes where they are.

    Args:
        num_codes: V.
        dim: D.
        metric: "euclidean", or "cosine", whose vectors have unit length.

    Attributes:
        vectors: float32 [V,D].
        counts: N of each code, float32 [V].
        idle: vectors seen since one chose the code, int64 [V].
        started: bool [].
    """

    vectors: Tensor
    counts: Tensor
    idle: Tensor
    started: Tensor

    def __init__(self, num_codes: int, dim: int, *, metric: Metric):
        super().__init__()
        self.num_codes = num_codes
        self.dim = dim
        self.metric = metric
        self.register_buffer("vectors", torch.zeros(num_codes, dim))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("idle", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        # Of this step, on this process. No buffers: DDP would overwrite them with the main process's.
        self._sums: Tensor | None = None  # float64 [V,D+1], the last column counts
        self._candidates: Tensor | None = None  # [R,D]
        self._is_started = False
        self.register_load_state_dict_post_hook(_read_again)

    def reset_parameters(self) -> None:
        """Back to before the start."""
        for buffer in self.buffers():
            buffer.zero_()
        self._sums = self._candidates = None
        self._is_started = False

    @property
    def is_started(self) -> bool:
        """Whether `start` was called; waits for the device until it was, and never after."""
        if not self._is_started:
            self._is_started = bool(self.started)
        return self._is_started

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The code of each vector: [...,D] -> int64 [...]; of several as near, the lowest.

        How a matrix product rounds depends on the number of its rows, so the closest calls, a 64th of all,
        are decided in float64.
        """
        rows = x.reshape(-1, self.dim).float()
        return clustering.nearest(rows, self.vectors, self.metric).reshape(x.shape[:-1])

    def quantize(self, x: Tensor) -> Quantized:
        """The nearest vectors to x [...,D]; their gradient goes to `x` (cosine: to its unit vector) as it is.

        The codebook gets no gradient.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = self._prepared(x)
            codes = self.nearest(x)
            return Quantized(self.vectors[codes] + (x - x.detach()), codes)

    @torch.no_grad()
    def start(self, samples: Tensor, *, seed: int, iterations: int = 10) -> None:
        """Clusters the samples of all processes: k-means++, then Lloyd's iterations, on the main process.

        In each iteration codes without samples move to the samples that are farthest from their codes. Codes
        that are left without (there are fewer samples than codes) are dead: the next moves give them vectors.
        Of more than 256 V samples, 256 V are taken. BEiT v2 starts from random samples, each process from its
        own.

        Args:
            samples: of this process, [...,D].
            seed: of the draws.
            iterations: Lloyd's.
        """
        most = _SAMPLES_PER_CODE * self.num_codes
        rows, _ = clustering.shuffle(self._prepared(samples).reshape(-1, self.dim), most)
        rows, is_repeated = clustering.shuffle(distributed.gather_rows(rows), most)
        assert len(rows), "a codebook cannot start without samples"
        vectors, idle = torch.zeros_like(self.vectors), torch.zeros_like(self.idle)
        if distributed.is_main():
            vectors = clustering.plus_plus(rows, self.num_codes, seed=seed)
            for _ in range(iterations):
                vectors = clustering.lloyd(rows, is_repeated, vectors, self.metric)
            used = idle.index_fill(0, clustering.nearest(rows, vectors, self.metric), 1)
            idle = torch.where(used > 0, 0, _IDLE_PER_CODE * self.num_codes)
        self.vectors.copy_(distributed.sum_over_ranks(vectors))  # the others' are 0
        self.idle.copy_(distributed.sum_over_ranks(idle))
        self.counts.zero_()
        self.started.fill_(True)
        self._is_started = True

    @torch.no_grad()
    def accumulate(self, x: Tensor, codes: Tensor) -> None:
        """Adds vectors [...,D] and their codes int64 [...] to what `move` follows."""
        rows = self._prepared(x).reshape(-1, self.dim)
        if self._sums is None:
            self._sums = rows.new_zeros(self.num_codes, self.dim + 1, dtype=torch.float64)
            self._candidates = rows[:0]
        assert self._candidates is not None
        clustering.add(self._sums, rows, codes.flatten())
        self._candidates, _ = clustering.shuffle(torch.cat([self._candidates, rows]), _MOST_REVIVED)

    @torch.no_grad()
    def move(self, decay: float | None, *, step: int, seed: int) -> None:
        """Follows what all processes accumulated since the last move, and gives dead codes new vectors.

        Args:
            decay: share of the old average that is kept; None: all vectors ever assigned count alike.
            step: finished steps, at least 1.
            seed: of the draws, with the step.
        """
        assert self._sums is not None and self._candidates is not None, "accumulate before the move"
        total = distributed.sum_over_ranks(self._sums)
        candidates = distributed.gather_rows(self._candidates)
        self._sums = self._candidates = None
        sums, added = total[:, :-1], total[:, -1]
        keep, weight = (1.0, 1.0) if decay is None else (decay, 1 - decay)
        counts = keep * self.counts.double() + weight * added
        old = self.vectors.double()
        if self.metric == "cosine" and decay is not None:
            moved = decay * old + (1 - decay) * F.normalize(sums, dim=1)
        else:
            moved = old + (sums - added[:, None] * old) * (weight / counts.clamp(min=1e-12))[:, None]
        if self.metric == "cosine":
            moved = F.normalize(moved, dim=1)
        used = added > 0
        self.vectors.copy_(torch.where(used[:, None], moved, old))
        self.counts.copy_(counts)
        self.idle.copy_(torch.where(used, 0, self.idle + added.sum().long()))
        self._revive(candidates, step=step, seed=seed)

    def _prepared(self, x: Tensor) -> Tensor:
        x = x.float()
        return F.normalize(x, dim=-1) if self.metric == "cosine" else x

    def _revive(self, candidates: Tensor, *, step: int, seed: int) -> None:
        """Moves dead codes to some of the candidates [n,D]."""
        candidates, is_repeated = clustering.shuffle(candidates, _MOST_REVIVED)
        codes = clustering.nearest(candidates, self.vectors, self.metric)
        weights = (candidates - self.vectors[codes]).double().square().sum(1)
        weights = torch.where(is_repeated, 0.0, weights)
        # the largest of log weight + Gumbel noise are a draw without repetition in proportion to the weights
        noise = np.random.Generator(np.random.Philox(key=[seed, step])).gumbel(size=len(candidates))
        priority = weights.log() + torch.from_numpy(noise).to(weights.device, non_blocking=True)
        dead = self.idle >= _IDLE_PER_CODE * self.num_codes
        vectors, revived = clustering.fill(self.vectors, dead, candidates, priority)
        self.vectors.copy_(vectors)
        self.counts.masked_fill_(revived, 0)
        self.idle.masked_fill_(revived, 0)


@torch.no_grad()
def code_metrics(codes: Tensor, num_codes: int) -> dict[str, Tensor]:
    """Perplexity of codes int64 of any shape, and how many of all V occur, as a share; [] each."""
    codes = codes.flatten()
    counts = torch.zeros(num_codes, device=codes.device)
    # bincount would wait for the device
    counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
    entropy = torch.special.entr(counts / len(codes)).sum()
    return {"perplexity": entropy.exp(), "codes_used": (counts > 0).float().mean()}


def _read_again(codebook: nn.Module, keys: object) -> None:
    """After a load: whether it is started is in the buffer."""
    assert isinstance(codebook, Codebook)
    codebook._is_started = False
