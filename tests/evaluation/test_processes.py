"""Evaluation on several processes equals evaluation on one: `main` below is what torchrun starts."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from mpm import distributed
from mpm.evaluation.accuracy import evaluate
from mpm.evaluation.features import extract
from mpm.evaluation.layer_features import extract_layers
from mpm.evaluation.predictions import predict_all


def _share(count: int, rank: int, world: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(count)
    data = TensorDataset(torch.randn(count, 7, generator=generator), places % 7, places)
    return DataLoader(Subset(data, range(rank, count, world)), batch_size=3)


def main(count: int) -> None:
    distributed.start("cpu")
    share = _share(count, distributed.rank(), distributed.world_size())
    whole = _share(count, 0, 1)
    scores, labels, places = (torch.cat(parts) for parts in zip(*whole, strict=True))

    accuracy = evaluate(lambda x: x, share, num_classes=7)
    expected = torch.zeros(7, 7, dtype=torch.int64)
    for label, predicted in zip(labels, scores.argmax(1), strict=True):
        expected[label, predicted] += 1
    assert accuracy.count == count
    assert torch.equal(accuracy.confusion, expected)
    assert accuracy.top5 == sum(y in s.topk(5).indices for s, y in zip(scores, labels, strict=True)) / count

    predictions = predict_all(lambda x: x, share, num_classes=7)
    assert torch.equal(predictions.place, places)
    assert torch.equal(predictions.best, scores.topk(5).indices)
    assert torch.equal(predictions.confidence, scores.softmax(1).amax(1))

    found = extract(lambda x: x, share)
    assert torch.equal(found.features, scores)
    assert torch.equal(found.labels, labels)
    several = extract_layers(
        lambda x: x.unflatten(1, (7, 1)), share, count=-(-count // distributed.world_size())
    )
    assert torch.equal(several.features[..., 0], scores.half())
    assert torch.equal(several.labels, labels)
    assert torch.equal(several.places, places)
    for limit in range(1, count):
        assert torch.equal(extract(lambda x: x, share, limit=limit).features, scores[:limit])
    distributed.stop()


@pytest.mark.torchrun
@pytest.mark.parametrize(("processes", "count"), [(2, 11), (3, 10), (3, 2)])
def test_each_sample_counts_once_on_uneven_shards(processes: int, count: int) -> None:
    """Also where one process has no sample at all (3 processes, 2 samples)."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    subprocess.run(
        [*launcher, "-m", "tests.evaluation.test_processes", str(count)],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
