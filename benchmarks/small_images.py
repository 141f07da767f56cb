"""The images of the grids of small runs: Fashion-MNIST in grey, clip art in colour.

Made by scripts/fetch_fashion_mnist.py and scripts/shrink_images.py.
"""

from typing import Any, NamedTuple


class Images(NamedTuple):
    """Sections of a configuration."""

    view: dict[str, Any]
    train: dict[str, Any]
    test: dict[str, Any]


_FASHION = {"kind": "torchvision", "name": "FashionMNIST", "root": "data"}
IMAGES = {
    "fashion_mnist": Images(
        view={"channels": 1, "mean": [0.2860], "std": [0.3530]},
        train=_FASHION,
        test=_FASHION | {"split": "test"},
    ),
    "clipart": Images(
        view={"channels": 3, "mean": "measured", "std": "measured"},
        train={"kind": "folder", "root": "data/clipart/train"},
        test={"kind": "folder", "root": "data/clipart/test"},
    ),
}


def labelled(name: str, *, image_size: int, held_out: float = 0.0, search: bool = False) -> dict[str, Any]:
    """The `data` of fine-tuning.

    Args:
        name: of the images.
        image_size: pixels a side.
        held_out: share of the training images that is looked at on the way.
        search: whether settings are searched for: then the test images are not looked at.
    """
    images = IMAGES[name]
    return {
        **images.view,
        "image_size": image_size,
        "train": images.train,
        "crop_scale": [0.6, 1.0],
        "test_crop": 1.0,
        **({"val": {"fraction": held_out}} if held_out else {}),
        **({} if search else {"test": images.test}),
    }


def unlabelled(name: str, image_size: int) -> dict[str, Any]:
    """The `data` of pretraining."""
    images = IMAGES[name]
    return images.train | images.view | {"image_size": image_size, "crop_scale": [0.5, 1.0]}
