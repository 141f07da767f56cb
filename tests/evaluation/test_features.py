import numpy as np
import pytest
import torch

from mpm.evaluation.features import extract, feature_std, rank_me


def _batches(count: int):
    images = torch.arange(count).float()[:, None].expand(-1, 3)
    return zip(images.split(4), torch.arange(count).split(4), strict=True)


@pytest.mark.parametrize("limit", [None, 1, 4, 6, 100])
def test_features_come_in_order_up_to_the_limit(limit: int | None) -> None:
    found = extract(lambda images: 2 * images.double(), _batches(10), limit=limit)
    n = min(limit or 10, 10)
    assert found.features.dtype == torch.float32
    assert found.features.shape == (n, 3)
    assert found.features[:, 0].tolist() == list(range(0, 2 * n, 2))
    assert found.labels.tolist() == list(range(n))


def test_limit_encodes_no_more_than_it_needs() -> None:
    sizes = []
    extract(lambda images: sizes.append(len(images)) or images, _batches(100), limit=6)
    assert sizes == [4, 4]


def test_no_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        extract(lambda images: images, [])


def test_rank_me_equals_its_formula() -> None:
    features = torch.randn(40, 12) @ torch.randn(12, 12)
    eigenvalues = np.linalg.eigvalsh(features.double().numpy().T @ features.double().numpy())
    p = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum() + 1e-7
    assert rank_me(features) == pytest.approx(np.exp(-sum(p * np.log(p))), rel=1e-6)


def test_rank_me_counts_directions() -> None:
    assert rank_me(torch.linalg.qr(torch.randn(50, 8)).Q) == pytest.approx(8, rel=1e-4)
    assert rank_me(torch.randn(50, 1) * torch.randn(8)) == pytest.approx(1, rel=1e-3)


def test_feature_std_tells_spread_from_collapse() -> None:
    spread = torch.randn(2000, 64)
    assert feature_std(spread) == pytest.approx(64**-0.5, rel=0.02)
    assert feature_std(torch.randn(64).expand(2000, -1) + 1e-3 * spread) < 1e-3
