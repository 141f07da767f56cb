"""Galleries, maps over images, the worst mistakes."""

import pytest
import torch

from mpm.evaluation.gallery import Scale, Tile, caption_lines, gallery, scaled
from mpm.evaluation.heat import colour_bar, overlay
from mpm.evaluation.mistakes import Mistake, mistakes_picture, worst_mistakes
from mpm.evaluation.predictions import Predictions


def test_mistakes_are_listed_from_the_surest_on() -> None:
    labels, best = torch.randint(3, (50,)), torch.randint(3, (50, 1))
    confidence, place = torch.rand(50), torch.randperm(50)
    found = worst_mistakes(Predictions(place, labels, best, confidence), "abc")
    wrong = [i for i in range(50) if best[i, 0] != labels[i]]
    expected = sorted(wrong, key=lambda i: -confidence[i])
    assert found == [
        (int(place[i]), "abc"[labels[i]], "abc"[best[i, 0]], float(confidence[i])) for i in expected
    ]


def test_the_first_mistakes_are_drawn_in_their_order() -> None:
    """Each image is one flat colour, its number in the source; no other is asked for."""
    mistakes = [Mistake(place, "a", "b", 0.9) for place in (7, 9, 4, 8)]
    asked = []

    def image_of(place: int) -> torch.Tensor:
        asked.append(place)
        return torch.full((3, 40, 40), 10 * place, dtype=torch.uint8)

    picture = mistakes_picture(mistakes, str, image_of, images=9, most=3)
    assert asked == [7, 9, 4]
    first_line = picture[0, 8 + 80]  # the middle of the first row of tiles, 8 pixels from the edge
    assert [int(first_line[8 + n * 168 + 80]) for n in range(3)] == [70, 90, 40]


def test_a_white_image_has_a_frame() -> None:
    white = torch.full((3, 30, 20), 255, dtype=torch.uint8)
    picture = gallery([[Tile(white)]], legend="")
    framed = (picture[0] < 255).nonzero()
    assert framed.amin(0).tolist() == [7, 7]
    assert framed.amax(0).tolist() == [8 + 30, 8 + 20]
    assert (picture[:, 8:38, 8:28] == 255).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("is signs_and_symbols", ["is signs_and_", "symbols"]),
        ("0197233fb0fa3c96.png", ["0197233fb0fa3c96", ".png"]),
        ("class-attention block 1 head 2", ["class-attention", "block 1 head 2"]),
        ("short", ["short"]),
    ],
)
def test_captions_are_broken_at_signs(text: str, expected: list[str]) -> None:
    """In a font whose letters are as wide as each other, 16 to a line."""
    found = list(caption_lines((text, "more"), 16, _Monospaced()))
    assert found == [*((line, "black") for line in expected), ("more", "grey")]


def test_a_caption_of_many_lines_keeps_its_ends() -> None:
    ((first, _), _, (last, _)) = caption_lines(("a" * 200 + ".png",), 16, _Monospaced())
    assert first == "a" * 16
    assert last.endswith(".png")


class _Monospaced:
    def getlength(self, text: str) -> float:
        return len(text)


def test_a_scale_has_words_at_both_ends() -> None:
    """The bar has one colour that nothing else has."""
    tile, bar = torch.full((3, 30, 20), 255, dtype=torch.uint8), torch.zeros(3, 12, 40, dtype=torch.uint8)
    bar[0] = 250
    bare = gallery([[Tile(tile)]], legend="", scale=Scale(bar, "", ""))
    told = gallery([[Tile(tile)]], legend="", scale=Scale(bar, "0", "max"))
    for picture, has_words in ((bare, False), (told, True)):
        below = picture[:, 30 + 16 :]
        columns = (below[1] == 0).nonzero()[:, 1]
        left, right = int(columns.min()), int(columns.max())
        assert right - left == 39
        assert (below[:, :, :left] < 255).any() == has_words
        assert (below[:, :, right + 1 :] < 255).any() == has_words


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


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_a_map_that_is_alike_everywhere_leaves_the_image_visible(spread: float) -> None:
    """A black and white image keeps half of its contrast; under a peak it loses most."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, 1::2] = 255
    weights = 1 + spread * torch.randn(4, 4).clamp(-1, 1)

    def contrast(drawn: torch.Tensor) -> torch.Tensor:
        return (drawn[..., 1::2].float() - drawn[..., ::2].float()).mean(0)

    assert contrast(overlay(image, weights)).min() > 0.4 * 255
    peak = torch.full((4, 4), 0.01)
    peak[1, 1] = 1
    assert contrast(overlay(image, peak))[12, 6] < 0.25 * 255
