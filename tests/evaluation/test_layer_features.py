import pytest
import torch

from mpm.evaluation.layer_features import extract_layers


def _batches(places: list[int]):
    numbers = torch.tensor(places)
    images = numbers.float()[:, None]
    return zip(images.split(4), (numbers % 3).split(4), numbers.split(4), strict=True)


def test_features_come_in_the_order_of_the_data_set_without_broken_images() -> None:
    places = [0, 1, 3, 4, 7, 8]  # 2, 5 and 6 could not be read
    found = extract_layers(lambda x: torch.stack([x, -x], 1), _batches(places), count=9)
    assert found.features.dtype == torch.half
    assert found.features.shape == (6, 2, 1)
    assert found.features[:, 1, 0].tolist() == [-place for place in places]
    assert found.places.tolist() == places
    assert found.labels.tolist() == [place % 3 for place in places]


def test_a_value_that_float16_cannot_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="above 65504"):
        extract_layers(lambda x: 1e5 * x[:, None], _batches([0, 1]), count=2)


def test_no_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        extract_layers(lambda x: x, [], count=0)
