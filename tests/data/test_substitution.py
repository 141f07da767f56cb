"""A broken image gives way to the next readable one, with its label and name."""

from collections.abc import Callable

import pytest
import torch

from mpm.data.substitution import Substituting, read_next


def test_next_readable_image_is_found_past_the_end(memory_images: Callable) -> None:
    source = memory_images(300, broken={298, 299, 0})
    place, image, broken = read_next(source, 298)
    assert (place, set(broken)) == (1, {298, 299, 0})
    assert torch.equal(image, source.read(1))


def test_label_and_name_are_those_of_the_image_that_was_read(memory_images: Callable) -> None:
    source = memory_images(200, num_classes=2, broken={4})
    images = Substituting(source)
    assert torch.equal(images.read(4), source.read(5))
    assert (images.label(4), images.name(4)) == (source.label(5), source.name(5))
    images.read(6)
    assert (images.label(6), images.name(6), len(images)) == (source.label(6), source.name(6), 200)


def test_more_than_one_percent_in_a_row_is_an_error(memory_images: Callable) -> None:
    with pytest.raises(ValueError, match="3 of 200 images cannot be read, which is more than 1 %; repair"):
        Substituting(memory_images(200, broken={7, 8, 9})).read(7)
