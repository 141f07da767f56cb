"""Pillow is the oracle for pictures; deep files are compared with the array that was written."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mpm.data.images import UnreadableImage, read_image


@pytest.fixture
def colour(rng: np.random.Generator) -> np.ndarray:
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((28, 20), Image.Resampling.BICUBIC))


def channels_first(array: np.ndarray) -> torch.Tensor:
    array = np.array(array)
    return torch.from_numpy(array)[None] if array.ndim == 2 else torch.from_numpy(array).permute(2, 0, 1)


def over(rgba: np.ndarray, background: tuple[int, int, int]) -> torch.Tensor:
    """Opacity laid on a background, in doubles."""
    alpha = rgba[..., 3:] / 255
    return channels_first(
        np.rint(rgba[..., :3] * alpha + np.array(background) * (1 - alpha)).astype(np.uint8)
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_equal_pillow(tmp_path: Path, colour: np.ndarray, suffix: str, mode: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(colour).convert(mode).save(path)
    image = read_image(path, channels=3)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 20, 28)
    # Two builds of libjpeg may round differently.
    torch.testing.assert_close(image, channels_first(Image.open(path).convert("RGB")), atol=1, rtol=0)


def test_grey_from_colour_is_pillows_luma(tmp_path: Path, colour: np.ndarray) -> None:
    Image.fromarray(colour).save(tmp_path / "image.png")
    expected = channels_first(Image.fromarray(colour).convert("L"))
    torch.testing.assert_close(read_image(tmp_path / "image.png", channels=1), expected, atol=0, rtol=0)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "palette key", "grey key", "opaque", "webp"])
def test_transparency_is_laid_on_the_background(
    tmp_path: Path,
    colour: np.ndarray,
    rng: np.random.Generator,
    kind: str,
    background: tuple[int, int, int],
) -> None:
    alpha = Image.fromarray(rng.integers(0, 256, colour.shape[:2], dtype=np.uint8))
    image = Image.fromarray(colour)
    path = tmp_path / ("image.webp" if kind == "webp" else "image.png")
    match kind:
        case "RGBA" | "webp":
            image.putalpha(alpha)
            image.save(path, lossless=True)
        case "LA":
            image = image.convert("L")
            image.putalpha(alpha)
            image.save(path)
        case "palette":
            image.quantize(16).save(path)
        case "palette key":
            image.quantize(16).save(path, transparency=3)
        case "grey key":
            image.convert("L").save(path, transparency=int(np.asarray(image.convert("L"))[0, 0]))
        case "opaque":
            image.convert("RGBA").save(path)
    expected = over(np.asarray(Image.open(path).convert("RGBA")), background)
    read = read_image(path, channels=3, background=background)
    torch.testing.assert_close(read, expected, atol=1, rtol=0)  # ties of the rounding
    grey = read_image(path, channels=1, background=background)
    luma = channels_first(Image.fromarray(expected.permute(1, 2, 0).numpy()).convert("L"))
    torch.testing.assert_close(grey, luma, atol=1, rtol=0)


@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4)])
def test_as_many_channels_as_the_file_has_stay_raw(
    tmp_path: Path, colour: np.ndarray, mode: str, channels: int
) -> None:
    image = Image.fromarray(colour).convert("L").convert(mode)
    image.putalpha(77)
    image.save(tmp_path / "image.png")
    read = read_image(tmp_path / "image.png", channels=channels)
    torch.testing.assert_close(read, channels_first(image))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_applied(tmp_path: Path, colour: np.ndarray, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise to be upright
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(colour).save(path, exif=exif)
    read = read_image(path, channels=3)
    assert read.shape == (3, 28, 20)
    upright = channels_first(colour).rot90(-1, (1, 2))
    assert (read.float() - upright.float()).abs().mean() < 12  # JPEG and WebP are lossy


def test_cmyk_jpeg_is_converted(tmp_path: Path, colour: np.ndarray) -> None:
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "image.jpg")
    expected = channels_first(Image.open(tmp_path / "image.jpg").convert("RGB"))
    torch.testing.assert_close(read_image(tmp_path / "image.jpg", channels=3), expected, atol=2, rtol=0)


def test_format_is_told_by_content(tmp_path: Path, colour: np.ndarray) -> None:
    Image.fromarray(colour).save(tmp_path / "really_a_png.jpg", format="PNG")
    read = read_image(tmp_path / "really_a_png.jpg", channels=3)
    torch.testing.assert_close(read, channels_first(colour))


@pytest.mark.parametrize("suffix", ["png", "tif", "npy"])
def test_sixteen_bits_stay_deep(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    pixels = rng.integers(0, 2**16, (6, 9), dtype=np.uint16)
    path = tmp_path / f"image.{suffix}"
    match suffix:
        case "png":
            Image.fromarray(pixels).save(path)
        case "tif":
            tifffile.imwrite(path, pixels)
        case "npy":
            np.save(path, pixels)
    read = read_image(path, channels=1)
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(np.rint(read[0].double().numpy() * 65535), pixels)
    np.testing.assert_array_equal(read[0].numpy(), pixels.astype(np.float32) / np.float32(65535))


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", ["tiff samples", "tiff planes", "tiff pages", "npy"])
def test_many_channels(
    tmp_path: Path, rng: np.random.Generator, channels: int, dtype: type, layout: str
) -> None:
    pixels = rng.integers(0, np.iinfo(dtype).max, (6, 9, channels), dtype=dtype)
    path = tmp_path / "image"
    planes = pixels.transpose(2, 0, 1)
    match layout:
        case "tiff samples":
            tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
        case "tiff planes":
            tifffile.imwrite(path, planes, photometric="minisblack", planarconfig="separate")
        case "tiff pages":
            tifffile.imwrite(path, planes, photometric="minisblack")
        case "npy":
            path = tmp_path / "image.npy"
            np.save(path, pixels)
    read = read_image(path, channels=channels)
    assert read.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    expected = planes if dtype == np.uint8 else planes.astype(np.float32) / np.float32(65535)
    np.testing.assert_array_equal(read.numpy(), expected)


def test_max_value_scales_and_checks_the_range(tmp_path: Path) -> None:
    path = tmp_path / "scan.npy"
    np.save(path, np.array([[0, 1000], [2047, 4095]], np.uint16))
    torch.testing.assert_close(
        read_image(path, channels=1, max_value=4095), torch.tensor([[[0, 1000 / 4095], [2047 / 4095, 1]]])
    )
    with pytest.raises(ValueError, match=r"scan.npy holds values from 0 to 4095, outside \[0, 1023\]"):
        read_image(path, channels=1, max_value=1023)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_that_are_not_finite_make_a_broken_image(value: float, tmp_path: Path) -> None:
    pixels = np.full((4, 4), 0.5, np.float32)
    pixels[1, 2] = value
    np.save(tmp_path / "scan.npy", pixels)
    with pytest.raises(UnreadableImage, match=r"scan\.npy: it holds values that are not finite"):
        read_image(tmp_path / "scan.npy", channels=1)


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_floats_outside_the_unit_range_are_refused(tmp_path: Path, value: float) -> None:
    np.save(tmp_path / "scan.npy", np.array([[0.5, value]], np.float32))
    with pytest.raises(ValueError, match="set max_value"):
        read_image(tmp_path / "scan.npy", channels=1)


def test_channels_that_do_not_fit_are_named_with_the_fix(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.zeros((4, 4, 5), np.uint8))
    with pytest.raises(ValueError, match=r"scan.npy has 5 channels.*set channels: 5") as caught:
        read_image(tmp_path / "scan.npy", channels=3)
    assert not isinstance(caught.value, UnreadableImage)  # the configuration is wrong, not the file


@pytest.mark.parametrize("damage", ["half", "empty", "text", "missing"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "npy"])
def test_broken_files_are_unreadable(tmp_path: Path, colour: np.ndarray, suffix: str, damage: str) -> None:
    path = tmp_path / f"image.{suffix}"
    if suffix == "npy":
        np.save(path, colour)
    else:
        Image.fromarray(colour).save(path)
    match damage:
        case "half":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no image at all")
        case "missing":
            path.unlink()
    with pytest.raises(UnreadableImage, match=f"image.{suffix}") as caught:
        read_image(path, channels=3)
    assert "\n" not in str(caught.value)


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(UnreadableImage, match="allow_pickle"):
        read_image(tmp_path / "image.npy", channels=1)
