"""k-means on rows of vectors: the nearest of them, k-means++, Lloyd's iterations.

Sums are float64 and `shuffle` orders rows by their values, so that no result depends on how they are spread.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Metric", "add", "fill", "lloyd", "nearest", "plus_plus", "shuffle"]

Metric = Literal["euclidean", "cosine"]

_MOST_DISTANCES = 2**24  # at a time
_MOST_WIDENED = 2**20  # numbers in float64 at a time, which a cache holds


def nearest(rows: Tensor, vectors: Tensor, metric: Metric) -> Tensor:
    """Codes int64 [n] of rows [n,D] among vectors [V,D]."""
    V = len(vectors)
    # x.v, less half of v.v where lengths count: the larger, the nearer
    bias = -vectors.square().sum(1) / 2 if metric == "euclidean" else vectors.new_zeros(V)
    codes = []
    for part in rows.split(max(1, _MOST_DISTANCES // V)):
        with torch.autocast(rows.device.type, enabled=False):
            likeness = torch.addmm(bias, part, vectors.T)  # [n,V]
        best, first = likeness.max(1)
        next_best, second = likeness.scatter_(1, first[:, None], -torch.inf).max(1)
        close = (best - next_best).topk(-(-len(part) // 64), largest=False).indices
        low, high = torch.minimum(first, second)[close], torch.maximum(first, second)[close]
        x, a, b = part[close].double(), vectors[low].double(), vectors[high].double()
        if metric == "euclidean":
            x = x - (a + b) / 2
        codes.append(first.index_copy(0, close, torch.where((x * (b - a)).sum(1) > 0, high, low)))
    return torch.cat(codes)


def add(sums: Tensor, rows: Tensor, codes: Tensor) -> None:
    """Adds rows [n,D] and a 1 for each to the sums float64 [V,D+1] of their codes."""
    length = max(1, _MOST_WIDENED // sums.shape[1])
    for part, own in zip(rows.split(length), codes.split(length), strict=True):
        sums.index_add_(0, own, F.pad(part.double(), (0, 1), value=1.0))


def shuffle(rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most so many of rows [n,D], in an order that only their values decide, and which repeat one before.

    The order is that of a hash, so the same are taken of however many rows on however many processes. Rows
    that differ by rounding are hashed nearly alike. Repeated rows come last.
    """
    D = rows.shape[1]
    golden = (1 + 5**0.5) / 2
    weights = 1000 * (1 + (torch.arange(1, D + 1, dtype=torch.float64, device=rows.device) * golden).frac())
    parts = rows.split(max(1, _MOST_WIDENED // D))
    keys, order = torch.cat([(part.double() * weights).sum(1) for part in parts]).remainder(1).sort()
    is_repeated = F.pad(keys[1:] == keys[:-1], (min(len(keys), 1), 0))
    kept = is_repeated.byte().argsort(stable=True)[:most]
    return rows[order[kept]], is_repeated[kept]


def fill(vectors: Tensor, wanted: Tensor, rows: Tensor, priority: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [V,D] with rows [n,D] in the place of wanted ones bool [V], and which they are: bool [V].

    Rows of highest priority [n] come first; those of -inf are left out. How many are wanted is never asked:
    that would wait for the device.
    """
    priority, order = priority.sort(descending=True)
    place = wanted.cumsum(0) - 1  # among the wanted
    filled = wanted & (place < len(rows))
    place = place.clamp(0, len(rows) - 1)
    filled = filled & (priority[place] > -torch.inf)
    return torch.where(filled[:, None], rows[order[place]], vectors), filled


def lloyd(samples: Tensor, is_repeated: Tensor, vectors: Tensor, metric: Metric) -> Tensor:
    """One of Lloyd's iterations: samples [n,D], vectors [V,D] -> [V,D]."""
    codes = nearest(samples, vectors, metric)
    total = samples.new_zeros(len(vectors), samples.shape[1] + 1, dtype=torch.float64)
    add(total, samples, codes)
    sums, counts = total[:, :-1], total[:, -1:]
    distance = (samples - vectors[codes]).square().sum(1)
    means = F.normalize(sums, dim=1) if metric == "cosine" else sums / counts.clamp(min=1)
    vectors = torch.where(counts > 0, means.float(), vectors)
    farthest = torch.where(is_repeated, 0.0, distance).log()
    return fill(vectors, counts[:, 0] == 0, samples, farthest)[0]


def plus_plus(samples: Tensor, count: int, *, seed: int) -> Tensor:
    """First vectors [count,D] by k-means++ (Arthur and Vassilvitskii 2007) from samples [n,D].

    Each is a sample, drawn in proportion to the squared distance from the nearest vector before it.
    """
    draws = np.random.Generator(np.random.Philox(key=[seed, 0])).random(count)
    targets = torch.from_numpy(draws).to(samples.device)
    squares = samples.square().sum(1)
    weights = torch.ones_like(squares)
    chosen = []
    with torch.autocast(samples.device.type, enabled=False):
        for number in range(count):
            cumulative = weights.double().cumsum(0)
            at = torch.searchsorted(cumulative, targets[number : number + 1] * cumulative[-1], right=True)
            at = at.clamp(max=len(samples) - 1)
            vector, square = samples[at], squares[at]
            distance = squares - 2 * (samples @ vector[0]) + square
            # what is left of equal ones by rounding is no distance
            distance = torch.where(distance > 1e-5 * (squares + square), distance, 0.0)
            weights = distance if number == 0 else torch.minimum(weights, distance)
            chosen.append(vector)
    return torch.cat(chosen)
