import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mpm.data.codes import create_code_cache, open_code_cache
from mpm.data.loading import BatchLoader, PretrainBatch, ViewDataset, eval_loader, train_loader
from mpm.data.rows import RowCache
from mpm.data.stream import EpochStream
from mpm.data.views import EvalView, PretrainView, TrainView
from mpm.patchify.masks import RandomMask

PRETRAIN = PretrainView(
    (8, 8), mask_sampler=RandomMask((4, 4), count=10), color_jitter=0.2, target_size=(4, 4)
)
TRAIN = TrainView((8, 8), rand_augment="rand-m9-mstd0.5-inc1", mean=(0.5,))


def loader(
    source, view, *, workers=0, steps=(0, 6), batch_size=8, crops=None, cached=None, **options
) -> BatchLoader:
    stream = EpochStream(len(source), batch_size, seed=0, start_step=steps[0], stop_step=steps[1], **options)
    return train_loader(
        ViewDataset(source, view, seed=5, crops=crops, cached=cached), stream, workers=workers
    )


def by_image(batches, field: str) -> dict[int, np.ndarray]:
    """The rows of a field by the image that was asked for or, in its place, read."""
    return {
        int(image): row.numpy()
        for batch in batches
        for image, row in zip(batch.index, getattr(batch, field), strict=True)
    }


def cached_codes(path: Path, source, *, crops: int, num_patches: int = 16) -> RowCache:
    sizes = {"crops": crops, "images": len(source), "num_patches": num_patches, "vocab_size": 65536}
    images = np.arange(len(source))[:, None] * num_patches + np.arange(num_patches)
    with create_code_cache(path, fingerprint={}, **sizes) as cache:
        for crop in range(crops):
            cache.write(crop, 0, images + 20_000 * crop)
    return open_code_cache(path, fingerprint={})


def test_pretraining_batches_are_eight_bit_with_exact_masks(memory_images: Callable) -> None:
    batches = list(loader(memory_images(40, (3, 12, 10)), PRETRAIN))
    assert len(batches) == 6
    for batch in batches:
        assert batch.images.dtype == batch.target_images.dtype == torch.uint8
        assert batch.images.shape == (8, 3, 8, 8)
        assert batch.target_images.shape == (8, 3, 4, 4)
        assert batch.masked.dtype == torch.bool
        assert batch.masked.sum(1).tolist() == [10] * 8
        assert batch.index.dtype == torch.int64


@pytest.mark.parametrize("view", [PRETRAIN, TRAIN], ids=["pretrain", "train"])
def test_batches_do_not_depend_on_workers(memory_images: Callable, view: PretrainView | TrainView) -> None:
    source = memory_images(20, num_classes=3)
    alone, helped = (list(loader(source, view, workers=workers)) for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_batches_do_not_depend_on_processes(memory_images: Callable) -> None:
    source = memory_images(20)
    shares = [list(loader(source, PRETRAIN, rank=rank, world_size=2)) for rank in range(2)]
    for whole, *parts in zip(loader(source, PRETRAIN), *shares, strict=True):
        for name in PretrainBatch._fields:
            if name != "codes":
                torch.testing.assert_close(
                    torch.cat([getattr(part, name) for part in parts]), getattr(whole, name), atol=0, rtol=0
                )


def test_resumed_batches_equal_the_uninterrupted_ones(memory_images: Callable) -> None:
    source = memory_images(20)
    whole = list(loader(source, PRETRAIN))
    torch.testing.assert_close(list(loader(source, PRETRAIN, steps=(4, 6))), whole[4:], atol=0, rtol=0)


def test_loading_leaves_the_global_generators_alone(memory_images: Callable) -> None:
    batches = loader(memory_images(20, num_classes=2), TRAIN)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(batches)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_epochs_and_repeats_see_other_crops_and_masks(memory_images: Callable) -> None:
    batches = list(loader(memory_images(4), PRETRAIN, batch_size=8, steps=(0, 2)))
    first = [batch.index.tolist().index(0) for batch in batches]
    again = batches[0].index.tolist().index(0, first[0] + 1)
    samples = [(0, first[0]), (0, again), (1, first[1])]
    assert len({batches[step].images[row].numpy().tobytes() for step, row in samples}) == 3
    assert len({batches[step].masked[row].numpy().tobytes() for step, row in samples}) == 3


def test_crops_come_again_under_other_masks(memory_images: Callable) -> None:
    source = memory_images(16, (3, 12, 10))
    epochs = [list(loader(source, PRETRAIN, crops=3, steps=(2 * e, 2 * e + 2))) for e in range(4)]
    for field, comes_again in (("images", True), ("target_images", True), ("masked", False)):
        first, *between, again = (by_image(batches, field) for batches in epochs)
        assert sorted(first) == sorted(again) == [*range(16)]
        equal = [np.array_equal(first[image], again[image]) for image in range(16)]
        assert all(equal) if comes_again else sum(equal) < 3
        for other in between:
            assert sum(np.array_equal(first[image], other[image]) for image in range(16)) < 3
    # masks are those of the epoch, as without crops that come again
    endless = by_image(loader(source, PRETRAIN, steps=(6, 8)), "masked")
    np.testing.assert_equal(by_image(epochs[3], "masked"), endless)


def test_few_images_see_all_crops_within_an_epoch(memory_images: Callable) -> None:
    (batch,) = loader(memory_images(4), PRETRAIN, crops=3, batch_size=12, steps=(0, 1))
    rows = [batch.images[row].numpy().tobytes() for row in range(12) if batch.index[row] == 0]
    assert len(rows) == len(set(rows)) == 3


def test_crop_that_comes_again_belongs_to_the_image_that_is_read(memory_images: Callable) -> None:
    source = memory_images(200)
    whole = by_image(loader(source, PRETRAIN, crops=1, steps=(0, 25)), "images")
    source.broken = {17, 18}
    batches = list(loader(source, PRETRAIN, crops=1, steps=(0, 25)))
    stand_ins = [batch.images[row] for batch in batches for row in torch.where(batch.index == 19)[0]]
    assert len(stand_ins) == 3
    for image in stand_ins:
        np.testing.assert_array_equal(image, whole[19])


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_codes_are_those_of_the_crop(memory_images: Callable, tmp_path: Path, workers: int) -> None:
    source = memory_images(16, (3, 12, 10))
    codes = cached_codes(tmp_path / "codes", source, crops=2)
    given = {"crops": 2, "steps": (0, 6), "workers": workers}
    with_codes = list(loader(source, PRETRAIN, cached=codes, **given))
    for step, (batch, plain) in enumerate(zip(with_codes, loader(source, PRETRAIN, **given), strict=True)):
        assert batch.codes.dtype == torch.int64
        expected = batch.index[:, None] * 16 + torch.arange(16) + 20_000 * (step // 2 % 2)
        assert torch.equal(batch.codes, expected)
        assert plain.codes is None
        assert batch.target_images is None  # and the rest is the same
        for field in ("images", "masked", "index"):
            assert torch.equal(getattr(batch, field), getattr(plain, field))


def test_codes_of_another_number_of_crops_or_images_are_refused(
    memory_images: Callable, tmp_path: Path
) -> None:
    codes = cached_codes(tmp_path / "codes", memory_images(16), crops=2)
    with pytest.raises(ValueError, match="2 crops of 16 images, not of 3 crops of 16"):
        loader(memory_images(16), PRETRAIN, crops=3, cached=codes)
    with pytest.raises(ValueError, match="2 crops of 16 images, not of 2 crops of 20"):
        loader(memory_images(20), PRETRAIN, crops=2, cached=codes)


def test_missing_codes_are_told_in_one_line(memory_images: Callable, tmp_path: Path) -> None:
    source = memory_images(200)
    sizes = {"crops": 1, "images": 200, "num_patches": 16, "vocab_size": 9}
    with create_code_cache(tmp_path / "codes", fingerprint={}, **sizes) as cache:
        cache.write(0, 0, np.zeros((200, 16), int), readable=np.arange(200) != 7)
    codes = open_code_cache(tmp_path / "codes", fingerprint={})
    with pytest.raises(ValueError, match="no codes for image 7"):
        list(loader(source, PRETRAIN, crops=1, cached=codes, steps=(0, 25)))
    source.broken = {7}
    assert len(list(loader(source, PRETRAIN, crops=1, cached=codes, steps=(0, 25)))) == 25


def test_whole_crops_have_no_mask(memory_images: Callable) -> None:
    whole = list(loader(memory_images(16), PretrainView((8, 8), mask_sampler=None)))
    for batch, masked in zip(
        whole,
        loader(memory_images(16), PretrainView((8, 8), mask_sampler=RandomMask((2, 2), count=1))),
        strict=True,
    ):
        assert batch.masked is None
        assert batch.index.equal(masked.index)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_counted_once_and_named(
    memory_images: Callable, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    source = memory_images(200, broken={17, 18})
    batches = loader(source, PRETRAIN, workers=workers, steps=(0, 50))  # two epochs
    seen = torch.cat([batch.index for batch in batches])
    assert set(batches.broken) == {17, 18}
    assert sorted(seen.tolist()) == sorted(2 * [*range(17), 19, 19, *range(19, 200)])
    assert sorted(record.args[0].split(":")[0] for record in caplog.records) == [
        "cannot read memory/17",
        "cannot read memory/18",
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [{3, 50, 120}, set(range(200))])
def test_more_than_one_percent_broken_is_an_error(
    memory_images: Callable, broken: set[int], workers: int
) -> None:
    with pytest.raises(ValueError, match=r"[34] of 200 images cannot be read.*memory/") as caught:
        list(loader(memory_images(200, broken=broken), PRETRAIN, workers=workers, steps=(0, 25)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_does_not_fit_is_told_in_one_line(memory_images: Callable, workers: int) -> None:
    with pytest.raises(ValueError, match="color_jitter works on 1 or 3 channels") as caught:
        list(loader(memory_images(20, (5, 9, 9)), PRETRAIN, workers=workers))
    assert "\n" not in str(caught.value)


def test_wrong_mask_count_does_not_reach_the_device(memory_images: Callable) -> None:
    class Uneven:
        count = 10

        def __call__(self, rng: np.random.Generator) -> np.ndarray:
            return rng.random(16) < 0.6

    with pytest.raises(AssertionError, match="same number"):
        list(loader(memory_images(20), PretrainView((8, 8), mask_sampler=Uneven())))


def test_labels_and_missing_labels(memory_images: Callable) -> None:
    for batch in loader(memory_images(20, num_classes=3), TRAIN):
        assert torch.equal(batch.labels, batch.index % 3)
    for batch in loader(memory_images(20), TRAIN):
        assert (batch.labels == -1).all()


def test_mixed_depths_become_float(memory_images: Callable) -> None:
    class MixedDepths:
        classes = None
        shallow = memory_images(16)

        def __len__(self) -> int:
            return 16

        def read(self, index: int) -> torch.Tensor:
            image = self.shallow.read(index)
            return image / 255 if index % 2 else image

    whole = TrainView((12, 10), crop_scale=(1.0, 1.0), crop_ratio=(10 / 12, 10 / 12), flip=False)
    mixed = next(iter(loader(MixedDepths(), whole, batch_size=16)))
    assert mixed.images.dtype == torch.float32
    shallow = next(iter(loader(MixedDepths.shallow, whole, batch_size=16)))
    torch.testing.assert_close(mixed.images, shallow.images / 255, atol=0, rtol=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_image_once(
    memory_images: Callable, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    source = memory_images(10, num_classes=3)
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr("mpm.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("mpm.distributed.world_size", lambda: world_size)
        for batch in eval_loader(source, EvalView((8, 8)), batch_size=4, workers=0):
            assert torch.equal(batch.labels, batch.index % 3)
            seen += batch.index.tolist()
    assert sorted(seen) == list(range(10))


def test_evaluation_leaves_out_broken_images_and_counts_them(memory_images: Callable) -> None:
    few = eval_loader(memory_images(500, broken={7}), EvalView((8, 8)), batch_size=1, workers=0)
    seen = [index for batch in few for index in batch.index.tolist()]
    assert seen == [index for index in range(500) if index != 7]
    assert list(few.broken) == [7]
    with pytest.raises(ValueError, match="6 of 500 images cannot be read, which is more than 1 %"):
        list(eval_loader(memory_images(500, broken={*range(9)}), EvalView((8, 8)), batch_size=2, workers=0))


def test_workers_outlive_a_signal_to_the_group(memory_images: Callable) -> None:
    batches = iter(loader(memory_images(20), PRETRAIN, workers=1, steps=(0, 20)))
    next(batches)
    import multiprocessing

    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 19
