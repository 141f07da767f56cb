"""How many images a second does the loader deliver, against ImageFolder + PIL as the official MAE has it?

    python -m benchmarks.loader --photographs /usr/share/wallpapers --root /tmp/photographs
    python -m benchmarks.loader --root /data/imagenet/train --out benchmarks/results/DATE_loader.jsonl

With --photographs, first makes `--count` JPEGs of 500 x 375 pixels, a typical size in ImageNet, below
--root out of the large JPEGs of that folder: crops of random size and place, quality 90. Smooth photographs
make smaller files than ImageNet's (about 110 kB), which are decoded faster: see `mean_file_bytes`. --root
is a folder of class folders, as ImageFolder wants it.

Cases:
    pil              ImageFolder, PIL, v1 transforms (bicubic RandomResizedCrop to 224, flip, ToTensor,
                     Normalize) to float32 batches, as in the official MAE
    torchvision_v2   ImageFolder with `decode_image` as its loader and v2 transforms on uint8: the peer at its
                     best
    in_memory        28 x 28 grey images in memory, no workers: microseconds a sample; the peer is the v1
                     transforms on PIL images

Ours is FolderImages, PretrainView and the masks (which the peers draw on the device), in uint8.

How to read the answer: `seconds` are those of an image, over all workers; `ratio` is the peer's / ours, per
round A B B A; above 1, ours is faster. Every turn starts fresh workers and times what follows the first
batches, while nobody computes, so workers never wait. `equality` compares the pixels: the mean absolute
difference, in grey levels of 0 to 255, of decoded images, and of crops of them that are resized to 224.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.measuring import Comparison, Results, interleaved, significant
from mpm.data.datasets import FolderImages, ImageSource
from mpm.data.images import read_image
from mpm.data.loading import ViewDataset, train_loader
from mpm.data.stream import EpochStream
from mpm.data.views import PretrainView, resize
from mpm.patchify.masks import RandomMask
from mpm.patchify.pixels import IMAGENET

SIDE, SCALE = 224, (0.2, 1.0)
JPEG_SIZE = (500, 375)


def make_jpegs(photographs: Path, root: Path, *, count: int, seed: int = 0) -> None:
    """Write `count` JPEGs to `root/photographs`, in equal shares from all large JPEGs below `photographs`."""
    width, height = JPEG_SIZE
    large = []
    for path in sorted(photographs.rglob("*.jp*g")):
        with Image.open(path) as image:
            if image.width >= 2 * width and image.height >= 2 * height:
                large.append(path)
    if not large:
        raise SystemExit(f"{photographs} holds no JPEGs of at least {2 * width} x {2 * height} pixels")
    folder = root / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number, path in enumerate(large):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        most = min(image.width / width, image.height / height)
        for index in range(number, count, len(large)):
            zoom = rng.uniform(1, most)
            w, h = round(width * zoom), round(height * zoom)
            left, top = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
            crop = image.resize(JPEG_SIZE, Image.Resampling.LANCZOS, (left, top, left + w, top + h))
            crop.save(folder / f"{index:06}.jpg", quality=90)


# The contenders: iterables of batches


def view(image_size: tuple[int, int], grid: tuple[int, int]) -> PretrainView:
    count = round(0.75 * grid[0] * grid[1])
    return PretrainView(image_size, mask_sampler=RandomMask(grid, count=count), crop_scale=SCALE)


def our_loader(source: ImageSource, look: PretrainView, *, batch: int, batches: int, workers: int) -> Any:
    stream = EpochStream(len(source), batch, seed=0, start_step=0, stop_step=batches)
    return train_loader(ViewDataset(source, look, seed=0), stream, workers=workers)


def v1_transforms(side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(side, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def pil_folder(root: Path) -> ImageFolder:
    return ImageFolder(str(root), transform=v1_transforms(SIDE, *IMAGENET))


def v2_folder(root: Path) -> ImageFolder:
    crop = v2.RandomResizedCrop(SIDE, SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    look = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return ImageFolder(str(root), transform=look, loader=_decode)


def _decode(path: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, ImageReadMode.RGB)


class InMemory:
    """Grey images in memory, as an `ImageSource`."""

    classes = None

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Tensor:
        return self.pixels[index]

    def label(self, index: int) -> int:
        return 0

    def name(self, index: int) -> str:
        return str(index)


class InMemoryPil(Dataset[tuple[Tensor, int]]):
    """The same as torchvision's FashionMNIST hands them over."""

    def __init__(self, source: InMemory):
        self._source = source
        self._transforms = v1_transforms(28, (0.286,), (0.353,))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transforms(Image.fromarray(self._source.pixels[index, 0].numpy())), 0


def peer_loader(dataset: Dataset[Any], *, batch: int, workers: int) -> DataLoader:
    return DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True)


# Timing


def turn(loader: Callable[[], Iterable[Any]], *, batch: int, skip: int, batches: int) -> list[float]:
    """Seconds of an image in each of `batches` batches after the first `skip`, from fresh workers."""
    stream = iter(loader())
    for _ in range(skip):
        next(stream)
    begin = time.perf_counter()
    for _ in range(batches):
        next(stream)
    # batches of several workers come in bunches: only their sum means something
    return [(time.perf_counter() - begin) / (batches * batch)]


def equality(paths: list[Path]) -> dict[str, float]:
    """Differences between what PIL and ours make of the same files."""
    decoded, resized = [], []
    for path in paths:
        with Image.open(path) as opened:
            theirs = opened.convert("RGB")
        ours = read_image(path, channels=3)
        decoded.append(_apart(ours, theirs))
        h, w = 2 * theirs.height // 3, 2 * theirs.width // 3
        their_crop = theirs.crop((0, 0, w, h)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        our_crop = resize(ours[:, :h, :w], (SIDE, SIDE), interpolation="bicubic")
        resized.append(_apart(our_crop, their_crop))
    return {
        "decoded_mean_difference": significant(statistics.mean(decoded)),
        "resized_mean_difference": significant(statistics.mean(resized)),
        "images": len(paths),
    }


def _apart(ours: Tensor, theirs: Image.Image) -> float:
    return float((ours.permute(1, 2, 0).float() - torch.from_numpy(np.array(theirs)).float()).abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.loader",
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of class folders of JPEGs")
    parser.add_argument(
        "--photographs", type=Path, help="fill --root from the large JPEGs of this folder first"
    )
    parser.add_argument("--count", type=int, default=2000, help="JPEGs to make")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="of four turns")
    parser.add_argument("--out", type=Path, help="file the JSON lines are appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the workers
    root, batch, batches, workers = arguments.root, arguments.batch, arguments.batches, arguments.workers
    if arguments.photographs:
        make_jpegs(arguments.photographs, root, count=arguments.count)

    results = Results("loader", torch.device("cpu"), out=arguments.out, packages=["torchvision", "pillow"])
    skip = 2 * max(workers, 1)  # what the workers read ahead

    def compare(ours: Callable[[], Any], theirs: Callable[[], Any], *, skip: int, batches: int) -> Comparison:
        return interleaved(
            lambda: turn(ours, batch=batch, skip=skip, batches=batches),
            lambda: turn(theirs, batch=batch, skip=skip, batches=batches),
            rounds=arguments.rounds,
        )

    with tempfile.TemporaryDirectory() as scratch:  # an index inside root would be a class to ImageFolder
        source = FolderImages(root, channels=3, index_file=Path(scratch) / "index.npz")
    paths = [root / source.name(index) for index in range(len(source))]
    if len(source) < batch * (skip + batches):
        parser.error(f"{len(source)} images are too few for {skip + batches} batches of {batch}")
    for path in paths:
        path.read_bytes()  # into the page cache
    equal = equality(paths[:32])
    look = view((SIDE, SIDE), (14, 14))
    for case, folder in (("pil", pil_folder(root)), ("torchvision_v2", v2_folder(root))):
        comparison = compare(
            lambda: our_loader(source, look, batch=batch, batches=skip + batches, workers=workers),
            lambda folder=folder: peer_loader(folder, batch=batch, workers=workers),
            skip=skip,
            batches=batches,
        )
        speeds = {
            "mpm": 1 / statistics.median(comparison.ours_s),
            case: 1 / statistics.median(comparison.theirs_s),
        }
        results.add(
            {
                "case": case,
                "images": len(source),
                "mean_file_bytes": round(statistics.mean(path.stat().st_size for path in paths)),
                "batch": batch,
                "workers": workers,
                "batches_per_turn": batches,
                **comparison.record("mpm", case),
                "images_per_s": {name: significant(speed) for name, speed in speeds.items()},
                "equality": equal,
            },
            f"{workers} workers: mpm {speeds['mpm']:.0f} images/s, {case} {speeds[case]:.0f} images/s, "
            f"{comparison}; resized crops differ by {equal['resized_mean_difference']:.2g} of 255",
        )

    memory = InMemory(10_000)
    pil_memory, look = InMemoryPil(memory), view((28, 28), (7, 7))
    comparison = compare(
        lambda: our_loader(memory, look, batch=batch, batches=1 + batches, workers=0),
        lambda: peer_loader(pil_memory, batch=batch, workers=0),
        skip=1,
        batches=batches,
    )
    micro = [1e6 * statistics.median(seconds) for seconds in comparison[:2]]
    results.add(
        {
            "case": "in_memory",
            "images": len(memory),
            "batch": batch,
            "workers": 0,
            "batches_per_turn": batches,
            **comparison.record("mpm", "pil"),
            "microseconds_per_sample": {"mpm": significant(micro[0]), "pil": significant(micro[1])},
        },
        f"28 x 28 in memory, one core: mpm {micro[0]:.0f} us a sample, pil {micro[1]:.0f} us, {comparison}",
    )
    results.finish()


if __name__ == "__main__":
    main()
