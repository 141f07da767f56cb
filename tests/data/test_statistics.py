import math
from collections.abc import Callable

import pytest
import torch

from mpm.data.statistics import channel_statistics


def test_statistics_equal_those_of_all_pixels(memory_images: Callable) -> None:
    source = memory_images(30, (2, 6, 5))
    pixels = source.pixels.double().transpose(0, 1).flatten(1) / 255
    statistics = channel_statistics(source)
    torch.testing.assert_close(torch.tensor(statistics.mean).double(), pixels.mean(1))
    torch.testing.assert_close(torch.tensor(statistics.std).double(), pixels.std(1, correction=0))
    assert math.isclose(statistics.minimum, pixels.min(), abs_tol=1e-7)
    assert math.isclose(statistics.maximum, pixels.max(), abs_tol=1e-7)
    assert (statistics.dtype, statistics.images) == ("uint8", 30)


def test_a_sample_is_enough_and_follows_the_seed(memory_images: Callable) -> None:
    source = memory_images(60)
    one, again, other = (channel_statistics(source, limit=10, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    assert one.images == 10


def test_broken_images_are_left_out(memory_images: Callable) -> None:
    assert channel_statistics(memory_images(10, broken={3})).images == 9
    with pytest.raises(ValueError, match="none of the 10 images"):
        channel_statistics(memory_images(10, broken=set(range(10))))
