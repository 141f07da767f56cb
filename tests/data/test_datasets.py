import os
import pickle
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from mpm.data.datasets import FolderImages, SyntheticImages, TorchvisionImages


def write(path: Path, value: int, *, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 3), value if mode == "L" else (value, value, value)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number, path in enumerate(["b/2.png", "a/x/1.png", "a/0.PNG", "c/3.png"]):
        write(tmp_path / path, number)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.png").write_text("nor this")
    return tmp_path


def test_any_tree_of_images_is_read_without_labels(tree: Path) -> None:
    source = FolderImages(tree, channels=3)
    assert source.classes is None
    assert [source.name(index) for index in range(len(source))] == [
        "a/0.PNG",
        "a/x/1.png",
        "b/2.png",
        "c/3.png",
    ]
    assert [int(source.read(index)[0, 0, 0]) for index in range(4)] == [2, 1, 0, 3]
    assert source.read(0).shape == (3, 3, 4)


def test_first_folders_are_the_classes(tree: Path) -> None:
    source = FolderImages(tree, channels=1, labels="folders")
    assert source.classes == ("a", "b", "c")
    assert [source.label(index) for index in range(4)] == [0, 0, 1, 2]
    assert source.read(0).shape == (1, 3, 4)


def test_names_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    folder, name = tmp_path / os.fsdecode(b"caf\xe9"), os.fsdecode(b"na\xefve \xc3\xa4.png")
    write(folder / name, 7)
    (folder / os.fsdecode(b"torn\xff.png")).write_bytes(b"torn")
    source = FolderImages(tmp_path, channels=3, labels="folders")
    assert source.classes == (r"caf\xe9",)
    assert [source.name(index) for index in range(2)] == [r"caf\xe9/na\xefve ä.png", r"caf\xe9/torn\xff.png"]
    assert int(source.read(0)[0, 0, 0]) == 7
    with pytest.raises(ValueError, match=r"cannot read .*/caf\\xe9/torn\\xff\.png: not a JPEG"):
        source.read(1)


def test_labels_of_a_flat_folder_are_refused_with_the_fix(tmp_path: Path) -> None:
    write(tmp_path / "1.png", 0)
    with pytest.raises(ValueError, match=r"1.png lies directly in .*one folder a class"):
        FolderImages(tmp_path, channels=3, labels="folders")


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        FolderImages(tmp_path / "nowhere", channels=3)
    with pytest.raises(ValueError, match=r"holds no images; expected files ending in \.jpg"):
        FolderImages(tmp_path, channels=3)


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    write(tmp_path / "ok.png", 0)
    try:
        (tmp_path / "ok.png").rename(tmp_path / b"\xff\xfe.png".decode(errors="surrogateescape"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert FolderImages(tmp_path, channels=3).read(0).shape == (3, 3, 4)


def test_folders_travel_to_workers(tree: Path) -> None:
    source = pickle.loads(pickle.dumps(FolderImages(tree, channels=3, labels="folders")))
    assert source.label(2) == 1
    assert source.name(3) == "c/3.png"


def write_idx(file: Path, array: np.ndarray) -> None:
    kind = struct.pack(">HBB", 0, 8, array.ndim)
    file.write_bytes(kind + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, np.ndarray]:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.array([3, 1, 4, 1, 5, 9], np.uint8))
    return tmp_path, pixels


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_is_held_in_memory(fashion: tuple[Path, np.ndarray], split: str) -> None:
    root, pixels = fashion
    source = TorchvisionImages("FashionMNIST", root=root, split=split, channels=1)
    assert len(source) == 6
    assert source.classes[9] == "Ankle boot"
    assert [source.label(index) for index in range(6)] == [3, 1, 4, 1, 5, 9]
    np.testing.assert_array_equal(source.read(2)[0], pixels[2])
    assert source.name(2) == f"FashionMNIST/{split}/2"
    assert TorchvisionImages("FashionMNIST", root=root, channels=3).read(0).shape == (3, 28, 28)


def test_cifar_is_channels_first(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    batch = {"data": pixels.reshape(2, -1), "labels": [0, 1]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", *"2345678", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    source = TorchvisionImages("CIFAR10", root=tmp_path, split="test", channels=3)
    np.testing.assert_array_equal(source.read(1), pixels[1])
    assert source.classes[1] == "automobile"


def test_sets_of_files_are_read_from_their_files(tmp_path: Path) -> None:
    for number, name in enumerate(["Forest", "River"]):
        write(tmp_path / "eurosat" / "2750" / name / f"{name}_1.png", number)
    source = TorchvisionImages("EuroSAT", root=tmp_path, channels=3)
    assert source.classes == ("Forest", "River")
    assert [source.label(index) for index in range(2)] == [0, 1]
    assert source.name(1).endswith("River_1.png")
    assert int(source.read(1).max()) == 1


@pytest.mark.parametrize(
    "name", ["FashionMNIST", "CIFAR10", "Flowers102", "EuroSAT", "ImageNet", "StanfordCars"]
)
def test_missing_sets_say_where_and_how(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"data set {name} could not be opened in {tmp_path}") as caught:
        TorchvisionImages(name, root=tmp_path, channels=3)
    by_hand = name in ("ImageNet", "StanfordCars")
    assert ("by hand" if by_hand else "download: true") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("FashionMNIST", "val", "FashionMNIST has no split 'val'; use train or test"),
        ("ImageNet", "test", "ImageNet has no split 'test'; use train or val"),
        ("ImageNet21k", "train", "data set 'ImageNet21k' is unknown; use one of MNIST, "),
    ],
)
def test_unknown_sets_and_splits_name_what_exists(
    tmp_path: Path, name: str, split: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TorchvisionImages(name, root=tmp_path, split=split, channels=3)


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_synthetic_images_are_deterministic_and_differ(channels: int) -> None:
    create = partial(SyntheticImages, 30, image_size=(12, 16), channels=channels, num_classes=5)
    source, again, other = create(seed=0), create(seed=0), create(seed=1)
    images = [source.read(index) for index in range(30)]
    assert images[0].shape == (channels, 12, 16)
    assert images[0].dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 30
    assert all(torch.equal(image, again.read(index)) for index, image in enumerate(images))
    assert not torch.equal(images[0], other.read(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_synthetic_classes_can_be_learnt(channels: int) -> None:
    """Nearest class mean of an amplitude spectrum, which phases do not change."""
    source = SyntheticImages(200, image_size=(16, 16), channels=channels, num_classes=10)
    images = torch.stack([source.read(index) for index in range(200)]).float()
    features = torch.fft.rfft2(images).abs().flatten(1)
    labels = torch.tensor([source.label(index) for index in range(200)])
    centres = torch.stack([features[:100][labels[:100] == number].mean(0) for number in range(10)])
    predicted = torch.cdist(features[100:], centres).argmin(1)
    assert (predicted == labels[100:]).float().mean() > 0.9


def test_another_seed_gives_other_images_of_the_same_synthetic_classes() -> None:
    first, second = (
        SyntheticImages(60, image_size=(16, 16), channels=3, num_classes=3, seed=seed) for seed in (0, 1)
    )
    assert not any(torch.equal(first.read(index), second.read(index)) for index in range(60))
    for label in range(3):
        colours = [
            torch.stack([source.read(i).float().mean((1, 2)) for i in range(label, 60, 3)]).mean(0)
            for source in (first, second)
        ]
        torch.testing.assert_close(*colours, rtol=0, atol=3)  # classes are up to 115 grey levels apart


def test_the_training_and_validation_parts_of_flowers_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeiT learns from both: 1,020 + 1,020 of the real ones; here 2 + 2."""
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
    folder = tmp_path / "flowers-102"
    for number in range(1, 7):
        write(folder / "jpg" / f"image_{number:05d}.jpg", 10 * number)
    labels = {"labels": np.array([[102, 1, 7, 1, 2, 3]])}
    scipy.io.savemat(folder / "imagelabels.mat", labels)
    parts = {"trnid": np.array([[3, 1]]), "valid": np.array([[4, 6]]), "tstid": np.array([[2, 5]])}
    scipy.io.savemat(folder / "setid.mat", parts)
    opened = partial(TorchvisionImages, "Flowers102", root=tmp_path, channels=3)
    both, test = opened(split="trainval"), opened(split="test")
    assert [Path(both.name(index)).stem[-1] for index in range(len(both))] == ["3", "1", "4", "6"]
    assert [both.label(index) for index in range(4)] == [6, 101, 0, 2]
    assert both.classes == test.classes
    assert len(both.classes) == 102


def test_a_set_without_a_validation_part_has_none_to_merge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CIFAR10 has no split 'trainval'; use train or test"):
        TorchvisionImages("CIFAR10", root=tmp_path, split="trainval", channels=3)
