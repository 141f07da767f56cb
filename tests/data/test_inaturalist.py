import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpm import build
from mpm.config import INaturalistSource
from mpm.data.inaturalist import INaturalistImages

# as in the competitions' files; identifiers are in no order, and one species is not in val
CATEGORIES = [
    {"id": 7, "name": "Vulpes vulpes", "supercategory": "Mammalia"},
    {"id": 2, "name": "Apis mellifera", "supercategory": "Insecta"},
    {"id": 5, "name": "Corvus corax", "supercategory": "Aves"},
]
TRAIN = {
    "images": [
        {"id": 31, "file_name": "train_val2018/Mammalia/7/a.jpg", "width": 6, "height": 4},
        {"id": 12, "file_name": "train_val2018/Aves/5/b.jpg", "width": 6, "height": 4},
        {"id": 25, "file_name": "train_val2018/Insecta/2/c.jpg", "width": 6, "height": 4},
    ],
    "annotations": [
        {"id": 0, "image_id": 12, "category_id": 5},
        {"id": 1, "image_id": 25, "category_id": 2},
        {"id": 2, "image_id": 31, "category_id": 7},
    ],
    "categories": CATEGORIES,
}
VAL = {"images": TRAIN["images"][:1], "annotations": TRAIN["annotations"][2:], "categories": CATEGORIES}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, image in enumerate(TRAIN["images"]):
        file = tmp_path / str(image["file_name"])
        file.parent.mkdir(parents=True)
        Image.new("RGB", (6, 4), (50 * number,) * 3).save(file)
    for name, content in (("train2018", TRAIN), ("val2018", VAL)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_images_have_the_species_of_their_annotation(root: Path) -> None:
    source = INaturalistImages(root, annotations="train2018.json", channels=3)
    assert source.classes == ("Apis mellifera", "Corvus corax", "Vulpes vulpes")
    assert [source.label(index) for index in range(len(source))] == [2, 1, 0]
    assert [source.name(index).rpartition("/")[2] for index in range(3)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [int(source.read(index).max()) for index in range(3)] == [0, 50, 100]
    assert source.read(0).shape == (3, 4, 6)
    assert pickle.loads(pickle.dumps(source)).label(1) == 1  # to workers


def test_parts_of_a_year_have_the_same_classes(root: Path) -> None:
    """Also where a species is not in both, and where the file lies elsewhere."""
    elsewhere = root / "annotations" / "val2018.json"
    elsewhere.parent.mkdir()
    (root / "val2018.json").rename(elsewhere)
    train, val = (
        build.source(
            INaturalistSource(root=root, annotations=file), image_size=(4, 4), channels=1, labelled=True
        )
        for file in ("train2018.json", elsewhere)
    )
    assert train.classes == val.classes
    assert (len(val), val.label(0)) == (1, 2)
    assert val.read(0).shape == (1, 4, 6)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in TRAIN.items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"annotations .*train2018.json cannot be read .*put the competition's file there"),
        ("{", "are no JSON"),
        (json.dumps(without("annotations")), "'annotations' is missing"),
        (json.dumps(without("categories")), "are not those of an iNaturalist competition"),
        (json.dumps(TRAIN | {"annotations": TRAIN["annotations"][:1]}), "31 is missing"),
        (json.dumps([1]), "are not those of an iNaturalist competition"),
        (json.dumps(TRAIN | {"images": []}), "list no images"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(root: Path, content: str | None, message: str) -> None:
    file = root / "train2018.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        INaturalistImages(root, annotations="train2018.json", channels=3)
    assert "\n" not in str(caught.value)
