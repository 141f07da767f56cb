r"""Copies a folder of images, small, once each, split into train and test, so that reading is no bottleneck.

    python scripts/shrink_images.py /usr/share/openclipart/png data/clipart --side 72 --min-images 100 \
        --leave-out special unsorted

Every folder directly below SOURCE is a class. Transparent pixels become white. Images whose small copies are
the same are kept once, so that no test image is among the training images; which part an image belongs to
depends on its pixels alone. Writes TARGET/train/CLASS/*.png and TARGET/test/CLASS/*.png, once all are made;
a part without images is not there.
"""

import argparse
import hashlib
import shutil
import sys
import warnings
from pathlib import Path

from PIL import Image


def shrink(path: Path, side: int) -> Image.Image:
    """The image, RGB, its shorter side at most `side` pixels."""
    with Image.open(path) as opened:
        opened.load()
        image = opened.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(side, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def main() -> int:
    """Copy, and tell how many of each class."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--side", type=int, default=256, help="shorter side in pixels")
    parser.add_argument("--test-share", type=float, default=0.2)
    parser.add_argument("--min-images", type=int, default=1, help="smaller classes are left out")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="CLASS")
    options = parser.parse_args()
    if options.target.exists() and any(options.target.iterdir()):
        print(f"{options.target} is there already; nothing to do")
        return 0

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of twice as many pixels, it is an error
    partial = options.target.with_name(f"{options.target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed, maybe with other options
    seen: set[str] = set()
    broken = 0
    for folder in sorted(path for path in options.source.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if folder.name in options.leave_out or len(files) < options.min_images:
            continue
        counts = {"train": 0, "test": 0}
        for file in files:
            try:
                image = shrink(file, options.side)
            except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises
                broken += 1
                continue
            digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            part = "test" if int(digest[:8], 16) < options.test_share * 16**8 else "train"
            place = partial / part / folder.name
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{digest[:16]}.png")
            counts[part] += 1
        print(f"{folder.name}: {counts['train']} to train, {counts['test']} to test of {len(files)} files")
    if not seen:
        sys.exit(f"{options.source} holds no image in folders of at least {options.min_images}")
    if options.target.exists():
        options.target.rmdir()
    partial.rename(options.target)
    print(f"{len(seen)} images in {options.target}; {broken} could not be read")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
