"""Weighted k-nearest-neighbour classification of features: a probe without training.

The protocol of instance discrimination (arXiv:1805.01978, section 3.4) with the settings of DINO
(arXiv:2104.14294): cosine similarity, 20 neighbours, weights exp(similarity / 0.07).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES = 2**24  # of one chunk: 64 MiB in fp32


@torch.no_grad()
def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
) -> Tensor:
    """Class scores of each query: the softmax weights of its k nearest neighbours, summed by class.

    Args:
        queries: [Q,D], float.
        bank: labelled features [n,D], same device and dtype.
        bank_labels: int64 [n], in [0, num_classes).
        k: neighbours, at most n.
        temperature: of the softmax over the k similarities; smaller trusts near neighbours more.
        num_classes: L.

    Returns: float [Q,L], rows sum to 1.

    Raises:
        ValueError: if k does not fit the bank.
    """
    if not 0 < k <= len(bank):
        raise ValueError(f"k {k} is not between 1 and the {len(bank)} labelled features; choose a smaller k")
    bank = F.normalize(bank, dim=1).T  # [D,n]
    scores = queries.new_zeros(len(queries), num_classes)
    size = max(1, _SIMILARITIES // bank.shape[1])
    for chunk, chunk_scores in zip(queries.split(size), scores.split(size), strict=True):
        similarity, neighbour = (F.normalize(chunk, dim=1) @ bank).topk(k)  # [q,k]
        chunk_scores.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).softmax(1))
    return scores


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
) -> float:
    """Share of the queries whose best class is the true one, in [0, 1]. Arguments as in `knn_predict`."""
    scores = knn_predict(queries, bank, bank_labels, k=k, temperature=temperature, num_classes=num_classes)
    return float((scores.argmax(1) == query_labels).double().mean())
