import torch

from mpm.tokenizers.clustering import lloyd


def test_empty_clusters_are_filled_with_the_farthest_samples() -> None:
    samples = torch.tensor([[0.0], [1], [10], [14], [40], [40]])
    repeated = torch.tensor([False, False, False, False, False, True])
    vectors = torch.tensor([[0.0], [100], [15], [200]])
    moved = lloyd(samples, repeated, vectors, "euclidean")
    # [0] has 0 and 1; [15] has 10, 14 and twice 40; farthest from theirs: 40 by 25, 10 by 5
    assert moved.flatten().tolist() == [0.5, 40, 26, 10]
