"""Rows of small pictures with words below each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["Scale", "Tile", "caption_lines", "gallery", "scaled"]

_FONT_PX, _LINE_PX, _GAP_PX = 13, 17, 8
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_MOST_LINES = 3  # of what stands in one line of a caption
_LEAST_LEGEND_PX = 480


class Tile(NamedTuple):
    """A picture with lines of text, the first in black, the others in grey.

    Attributes:
        image: uint8 [3,h,w].
        caption: lines; what is wider than the picture is broken into several, what needs more than three
            loses its middle.
    """

    image: Tensor
    caption: tuple[str, ...] = ()


class Scale(NamedTuple):
    """What colours mean.

    Attributes:
        bar: uint8 [3,h,w], from the left to the right.
        least: what the left end stands for.
        most: what the right end stands for.
    """

    bar: Tensor
    least: str
    most: str


def gallery(rows: Sequence[Sequence[Tile | None]], *, legend: str, scale: Scale | None = None) -> Tensor:
    """Framed tiles of one size in rows, with a text below all that says what they are.

    Args:
        rows: None leaves a place empty.
        legend: the text.
        scale: drawn before it.

    Returns: uint8 [3,H,W].
    """
    font = ImageFont.load_default(_FONT_PX)
    tiles = [tile for row in rows for tile in row if tile is not None]
    _, h, w = tiles[0].image.shape
    captions = {id(tile): list(caption_lines(tile.caption, w, font)) for tile in tiles}
    lines = max(map(len, captions.values()))
    below = lines * _LINE_PX + _GAP_PX // 2 if lines else 0
    step_y, step_x = h + below + _GAP_PX, w + _GAP_PX
    indent = 0 if scale is None else _scale_width(scale, font)
    width = max(max(map(len, rows)) * step_x + _GAP_PX, _LEAST_LEGEND_PX)
    told = _broken(legend, width - 2 * _GAP_PX - indent, font)
    bottom = len(rows) * step_y + _GAP_PX
    picture = Image.new("RGB", (width, bottom + len(told) * _LINE_PX + _GAP_PX), "white")
    draw = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        for place, tile in enumerate(row):
            if tile is None:
                continue
            x, y = _GAP_PX + place * step_x, _GAP_PX + number * step_y
            draw.rectangle((x - 1, y - 1, x + w, y + h), outline="lightgrey")  # white images end somewhere
            picture.paste(_pillow(tile.image), (x, y))
            for line, (text, colour) in enumerate(captions[id(tile)]):
                corner = (x, y + h + _GAP_PX // 2 + line * _LINE_PX)
                draw.text(corner, text, fill=colour, font=font)
    if scale is not None:
        _draw_scale(picture, scale, bottom, font)
    for line, text in enumerate(told):
        middle = (_GAP_PX + indent, bottom + (line + 0.5) * _LINE_PX)
        draw.text(middle, text, fill="grey", font=font, anchor="lm")
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()


def scaled(image: Tensor, height: int) -> Tensor:
    """A picture of about another height, its aspect kept; pixels of small ones grow by a whole number.

    Args:
        image: uint8 [3,h,w].
        height: in pixels.
    """
    h, w = image.shape[-2:]
    if h < height:
        times = max(1, round(height / h))
        return image.repeat_interleave(times, -2).repeat_interleave(times, -1)
    size = (max(1, round(w * height / h)), height)
    resized = _pillow(image).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)


def _pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _scale_width(scale: Scale, font: _Font) -> int:
    """With the gap behind it."""
    _, _, w = scale.bar.shape
    return int(font.getlength(scale.least) + font.getlength(scale.most)) + w + 2 * _GAP_PX


def _draw_scale(picture: Image.Image, scale: Scale, top: int, font: _Font) -> None:
    draw = ImageDraw.Draw(picture)
    _, h, w = scale.bar.shape
    left, middle = _GAP_PX + int(font.getlength(scale.least)) + _GAP_PX // 2, top + _LINE_PX / 2
    draw.text((_GAP_PX, middle), scale.least, fill="grey", font=font, anchor="lm")
    picture.paste(_pillow(scale.bar), (left, round(middle - h / 2)))
    draw.text((left + w + _GAP_PX // 2, middle), scale.most, fill="grey", font=font, anchor="lm")


def caption_lines(caption: Sequence[str], width: int, font: _Font) -> Iterator[tuple[str, str]]:
    """Lines that fit, with their colours.

    Args:
        caption: see `Tile`.
        width: in pixels.
        font: whose letters are measured.
    """
    for number, text in enumerate(caption):
        broken = _broken(text, width, font)
        kept = len(text)
        while len(broken) > _MOST_LINES:
            kept -= 1
            broken = _broken(f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}", width, font)
        for line in broken:
            yield line, "grey" if number else "black"


def _broken(text: str, width: int, font: _Font) -> list[str]:
    """Lines that fit, broken at a blank or a sign where there is one, else anywhere."""
    lines = []
    while font.getlength(text) > width:
        end = next(end for end in range(len(text), 0, -1) if font.getlength(text[:end]) <= width or end == 1)
        at_signs = [n for n in range(1, end + 1) if text[n] in " ." or text[n - 1] in " _-/,;"]
        end = at_signs[-1] if at_signs else end
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text]
