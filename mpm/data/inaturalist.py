"""iNaturalist 2018 and 2019 from the files of their competitions."""

import json
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from mpm.data.folder_index import PathTable
from mpm.data.images import read_image


class INaturalistImages:
    """Images and species of an annotations file: `images`, `annotations` and `categories`, as in COCO's.

    Classes are the categories by id, all of them, so that the files of one year agree.

    Args:
        root: folder that the file names start from.
        annotations: of the file; in `root`, unless absolute.
        channels: of every image read.

    Raises:
        ValueError: if the file is missing, or is no annotations file.
    """

    def __init__(self, root: str | os.PathLike[str], *, annotations: str | os.PathLike[str], channels: int):
        self.root = Path(root)
        self.channels = channels
        file = self.root / annotations
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            categories = sorted(content["categories"], key=lambda category: category["id"])
            numbers = {category["id"]: number for number, category in enumerate(categories)}
            species = {entry["image_id"]: numbers[entry["category_id"]] for entry in content["annotations"]}
            paths = [os.fsencode(image["file_name"]) for image in content["images"]]
            self._labels = np.array([species[image["id"]] for image in content["images"]], np.int64)
        except OSError as error:
            raise ValueError(
                f"annotations {file} cannot be read ({error.strerror}); "
                "put the competition's file there, such as train2018.json"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"annotations {file} are no JSON ({error}); fetch the file again") from None
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"annotations {file} are not those of an iNaturalist competition: {error} is missing or of "
                "another form; use train2018.json, val2018.json, or those of 2019"
            ) from None
        if not paths:
            raise ValueError(
                f"annotations {file} list no images; use those of the training or validation part"
            )
        self.classes: tuple[str, ...] | None = tuple(str(category["name"]) for category in categories)
        self._paths = PathTable.of(paths)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Tensor:
        """[C,H,W] uint8."""
        return read_image(self.root / self.name(index), channels=self.channels)

    def label(self, index: int) -> int:
        """Number of the species."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Path relative to the root."""
        return os.fsdecode(self._paths[index])
