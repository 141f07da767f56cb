"""Galleries, maps over images, the worst mistakes."""

import pytest
import torch

from mpm.evaluation.gallery import Tile, gallery, scaled
from mpm.evaluation.heat import colour_bar, overlay
from mpm.evaluation.mistakes import mistakes_picture, worst_mistakes
from mpm.evaluation.predictions import Predictions


def test_worst_mistakes_are_the_surest_wrong_ones() -> None:
    labels, best = torch.randint(3, (50,)), torch.randint(3, (50, 1))
    confidence = torch.rand(50)
    found = worst_mistakes(Predictions(torch.arange(50), labels, best, confidence), 5).tolist()
    wrong = [i for i in range(50) if best[i, 0] != labels[i]]
    assert found == sorted(wrong, key=lambda i: -confidence[i])[:5]


def test_mistakes_are_drawn_from_the_surest_on() -> None:
    """Each image is one flat colour, its number in the source; the right one is not asked for."""
    labels, best = torch.tensor([0, 1, 1, 0]), torch.tensor([[1], [0], [1], [1]])
    predictions = Predictions(torch.tensor([4, 7, 8, 9]), labels, best, torch.tensor([0.7, 0.9, 1.0, 0.8]))
    asked = []

    def image_of(place: int) -> torch.Tensor:
        asked.append(place)
        return torch.full((3, 40, 40), 10 * place, dtype=torch.uint8)

    picture = mistakes_picture(predictions, ["a", "b"], image_of)
    assert asked == [7, 9, 4]
    first_line = picture[0, 8 + 80]  # the middle of the first row of tiles, 8 pixels from the edge
    assert [int(first_line[8 + n * 168 + 80]) for n in range(3)] == [70, 90, 40]


def test_gallery_puts_every_tile_into_its_place() -> None:
    tiles = [
        [Tile(torch.full((3, 30, 20), 10 * r + c, dtype=torch.uint8), ("x",)) for c in range(3)]
        for r in (1, 2)
    ]
    picture = gallery([tiles[0], [None, *tiles[1][1:]]], legend="all")
    for row in (1, 2):
        for column in range(3):
            top, left = 8 + (row - 1) * (30 + 17 + 4 + 8), 8 + column * 28
            there = picture[:, top : top + 30, left : left + 20]
            expected = 255 if (row, column) == (2, 0) else 10 * row + column
            assert (there == expected).all()


@pytest.mark.parametrize(("size", "expected"), [((28, 28), 140), ((64, 32), 128), ((224, 112), 144)])
def test_scaled_keeps_pixels_square_and_the_aspect(size, expected: int) -> None:
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    found = scaled(image, 144)
    assert found.shape == (3, expected, round(expected * size[1] / size[0]))
    if size[0] < 144:
        times = expected // size[0]
        assert torch.equal(found[:, ::times, ::times], image)


def test_overlay_is_lightest_where_the_weight_is_largest() -> None:
    image = torch.full((3, 30, 40), 128, dtype=torch.uint8)
    weights = torch.zeros(3, 4)
    weights[1, 2] = 0.02
    brightness = overlay(image, weights).float().mean(0)
    assert divmod(int(brightness.argmax()), 40)[0] in range(10, 20)
    assert divmod(int(brightness.argmax()), 40)[1] in range(20, 30)
    assert torch.equal(overlay(image, weights), overlay(image, 5 * weights))  # each map has its own scale
    assert torch.equal(overlay(image, -weights), overlay(image, 0 * weights))
    assert (colour_bar().float().mean(0)[0].diff() >= 0).all()  # can be read without colours
