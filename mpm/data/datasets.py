"""Where images come from: folders, the sets torchvision knows, and synthetic textures."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mpm.data.channels import with_channels
from mpm.data.folder_index import PathTable, indexed_paths, main_process_first
from mpm.data.images import EXTENSIONS, legible, read_image


class ImageSource(Protocol):
    """Numbered images, with class labels or without.

    Attributes:
        classes: their names, label order. None: the images have no labels.
    """

    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """[C,H,W] uint8, or float32 in [0, 1] for deeper data. Raises UnreadableImage."""
        ...

    def label(self, index: int) -> int:
        """Class number; only where there are `classes`."""
        ...

    def name(self, index: int) -> str:
        """What a person finds the image by; it can be written as UTF-8."""
        ...


class FolderImages:
    """All images below a folder, in any tree.

    Args:
        root: the folder.
        channels: of every image read.
        labels: "none", or "folders": the first folder on the way to an image is its class; sorted.
        background: red, green, blue in 0..255 under transparency.
        max_value: the stored value that becomes 1 (see `read_image`).
        index_file: where the list of files is kept (see `indexed_paths`).

    Raises:
        ValueError: if the folder is missing, holds no images, or holds images outside the class folders.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        channels: int,
        labels: Literal["none", "folders"] = "none",
        background: Sequence[int] = (255, 255, 255),
        max_value: float | None = None,
        index_file: str | os.PathLike[str] | None = None,
    ):
        self.root = Path(root)
        self.channels = channels
        self.background = tuple(background)
        self.max_value = max_value
        if not self.root.is_dir():
            raise ValueError(f"image folder {self.root} does not exist; give a folder of images")
        self._paths = indexed_paths(self.root, index_file=Path(index_file) if index_file else None)
        if not len(self._paths):
            raise ValueError(f"{self.root} holds no images; expected files ending in {', '.join(EXTENSIONS)}")
        self.classes: tuple[str, ...] | None = None
        if labels == "folders":
            self.classes, self._labels = _first_folders(self._paths, self.root)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Tensor:
        """[C,H,W] uint8, or float32 in [0, 1]."""
        return read_image(
            self.path(index),
            channels=self.channels,
            background=self.background,
            max_value=self.max_value,
        )

    def label(self, index: int) -> int:
        """Number of the class folder."""
        return int(self._labels[index])

    def path(self, index: int) -> Path:
        """Of the file."""
        return self.root / os.fsdecode(self._paths[index])

    def name(self, index: int) -> str:
        """Path relative to the root, see `legible`."""
        return legible(self._paths[index])


def _first_folders(paths: PathTable, root: Path) -> tuple[tuple[str, ...], np.ndarray]:
    separator = os.fsencode(os.sep)
    numbers: dict[bytes, int] = {}  # paths come sorted by folder
    labels = np.empty(len(paths), np.int64)
    for index, path in enumerate(paths):
        folder, inside, _ = path.partition(separator)
        if not inside:
            raise ValueError(
                f"{legible(path)} lies directly in {root}, outside any class folder; "
                "move the images to one folder a class (root/class/image.jpg)"
            )
        labels[index] = numbers.setdefault(folder, len(numbers))
    return tuple(legible(folder) for folder in numbers), labels


# What torchvision calls the splits of each set.
_SPLITS: dict[str, dict[str, dict[str, Any]]] = {
    "MNIST": {"train": {"train": True}, "test": {"train": False}},
    "FashionMNIST": {"train": {"train": True}, "test": {"train": False}},
    "CIFAR10": {"train": {"train": True}, "test": {"train": False}},
    "CIFAR100": {"train": {"train": True}, "test": {"train": False}},
    "Flowers102": {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}},
    "StanfordCars": {"train": {"split": "train"}, "test": {"split": "test"}},
    "INaturalist": {"train": {"version": "2021_train"}, "val": {"version": "2021_valid"}},
    "ImageNet": {"train": {"split": "train"}, "val": {"split": "val"}},
    "Places365": {"train": {"split": "train-standard"}, "val": {"split": "val"}},
    "EuroSAT": {"train": {}},
}
_NOT_DOWNLOADABLE = ("ImageNet", "StanfordCars")


class TorchvisionImages:
    """A labelled set that torchvision knows by name.

    MNIST, FashionMNIST and CIFAR are held in memory; of the others the files are read with `read_image`.

    Args:
        name: of the class in `torchvision.datasets`.
        root: the folder torchvision keeps its sets in.
        split: "train", "val" or "test", as far as the set has it; "trainval": the first two.
        channels: of every image read.
        download: fetch what is missing, on the main process.

    Raises:
        ValueError: if the set or the split is unknown, or the files are missing.
    """

    def __init__(
        self,
        name: str,
        *,
        root: str | os.PathLike[str],
        split: str = "train",
        channels: int,
        download: bool = False,
    ):
        if name not in _SPLITS:
            raise ValueError(f"data set {name!r} is unknown; use one of {', '.join(_SPLITS)}")
        splits = _SPLITS[name]
        wanted = ("train", "val") if split == "trainval" else (split,)
        if not splits.keys() >= set(wanted):
            raise ValueError(f"{name} has no split {split!r}; use {' or '.join(splits)}")
        self.channels = channels
        with main_process_first():
            parts = [_open_torchvision(name, Path(root), splits[s], download=download) for s in wanted]
        stored = parts[0]
        self._prefix = f"{name}/{split}"
        self._pixels: Tensor | None = None  # uint8 [n,C,H,W]
        if hasattr(stored, "data"):
            pixels = torch.as_tensor(stored.data)
            self._pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
            self._labels = np.asarray(stored.targets, np.int64)
        else:
            entries = (part[index] for part in parts for index in range(len(part)))
            files, labels = zip(*entries, strict=True)
            self._paths = PathTable.of(os.fsencode(file) for file in files)
            self._labels = np.array(labels, np.int64)
        self.classes: tuple[str, ...] | None = _class_names(stored, int(self._labels.max()) + 1)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Tensor:
        """[C,H,W] uint8."""
        if self._pixels is None:
            return read_image(os.fsdecode(self._paths[index]), channels=self.channels)
        pixels = self._pixels[index]
        if len(pixels) == self.channels:
            return pixels
        return with_channels(pixels, self.channels, has_alpha=False, background=(), name=self.name(index))

    def label(self, index: int) -> int:
        """Number of the class."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Path of the file, or set, split and number where all images are in one file."""
        if self._pixels is None:
            return legible(self._paths[index])
        return f"{self._prefix}/{index}"


def _open_torchvision(name: str, root: Path, split: dict[str, Any], *, download: bool) -> Any:
    from torchvision import datasets

    arguments = dict(split)
    if name not in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"):
        arguments["loader"] = _path_itself
    if name not in _NOT_DOWNLOADABLE:
        arguments["download"] = download and not (
            name == "INaturalist" and (root / split["version"]).is_dir()
        )
    try:
        return getattr(datasets, name)(root, **arguments)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        reason = str(error).split("\n")[0].rstrip(".:")
        if name in _NOT_DOWNLOADABLE:
            fix = f"it must be downloaded by hand, see torchvision.datasets.{name}"
        else:
            place = root / name / "raw (unpacked)" if name in ("MNIST", "FashionMNIST") else root
            fix = (
                f"{'check the network' if download else 'set download: true'}, or put its files into {place}"
            )
        raise ValueError(f"data set {name} could not be opened in {root} ({reason}); {fix}") from error


def _path_itself(path: str | os.PathLike[str]) -> str:
    """In place of torchvision's image loader: a set yields paths and labels without reading pixels."""
    return os.fspath(path)


def _class_names(stored: Any, count: int) -> tuple[str, ...]:
    names = getattr(stored, "classes", None) or getattr(stored, "all_categories", None) or range(count)
    return tuple(
        name if isinstance(name, str) else ", ".join(name) if isinstance(name, tuple) else str(name)
        for name in names
    )


class SyntheticImages:
    """Plaids with a colour, a frequency per axis and noise: for dry runs, benchmarks and tests.

    The class sets colour and frequencies, which flips leave alone, so it can be learnt; phases and noise
    belong to the image. Image `i` has class `i % num_classes`.

    Args:
        count: number of images.
        image_size: height, width in pixels.
        channels: of the images.
        num_classes: number of classes.
        seed: of the images; the classes look alike under every seed.
    """

    def __init__(
        self, count: int, *, image_size: tuple[int, int], channels: int, num_classes: int, seed: int = 0
    ):
        self.classes: tuple[str, ...] | None = tuple(f"texture_{number}" for number in range(num_classes))
        self._count = count
        self._seed = seed
        H, W = self._size = image_size
        rng = np.random.Generator(np.random.Philox(key=[0, 0]))
        side = math.ceil(math.sqrt(num_classes))
        numbers = rng.permutation(side * side)[:num_classes]
        self._frequencies = np.stack([numbers // side, numbers % side], 1) + 1.0  # periods per image, [L,2]
        self._colours = rng.uniform(70, 185, (num_classes, channels, 1, 1)).astype(np.float32)
        self._contrasts = rng.uniform(20, 60, (num_classes, channels, 1, 1)).astype(np.float32)
        # One field of noise, twice the size; each image takes its window from another place.
        self._noise = rng.normal(0, 6, (channels, 2 * H, 2 * W)).clip(-10, 10).astype(np.float32)

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Tensor:
        """[C,H,W] uint8."""
        H, W = self._size
        number = self.label(index)
        draws = np.random.Generator(np.random.Philox(key=[self._seed, 1 + index])).random(4)
        rows = np.cos(
            2 * np.pi * (np.arange(H, dtype=np.float32) * (self._frequencies[number, 0] / H) + draws[0])
        )
        columns = np.cos(
            2 * np.pi * (np.arange(W, dtype=np.float32) * (self._frequencies[number, 1] / W) + draws[1])
        )
        plaid = np.outer(rows, columns).astype(np.float32)
        top, left = int(draws[2] * H), int(draws[3] * W)
        pixels = self._contrasts[number] * plaid
        pixels += self._colours[number]
        pixels += self._noise[:, top : top + H, left : left + W]
        return torch.from_numpy(pixels.astype(np.uint8))  # within 0..255 by the ranges above

    def label(self, index: int) -> int:
        """Number of the texture."""
        return index % len(self.classes or ())

    def name(self, index: int) -> str:
        """Number of the image."""
        return f"synthetic/{index}"
