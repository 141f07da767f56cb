import itertools
from collections import Counter

import pytest

from mpm.data.stream import EpochStream, SampleKey


def keys(count: int, batch_size: int, **options: int) -> list[SampleKey]:
    options = {"seed": 0, "start_step": 0, "stop_step": 5, "rank": 0, "world_size": 1} | options
    return list(itertools.chain.from_iterable(EpochStream(count, batch_size, **options)))


def test_an_epoch_shows_each_image_at_most_once() -> None:
    epoch = keys(21, 4)
    assert len({key.image for key in epoch}) == 20
    assert {key.epoch for key in epoch} == {0}
    assert {key.repeat for key in epoch} == {0}


def test_order_differs_between_epochs_and_seeds() -> None:
    two = keys(20, 20, stop_step=2)
    other = keys(20, 20, stop_step=1, seed=1)
    orders = [[key.image for key in part] for part in (two[:20], two[20:], other)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [key.epoch for key in two] == [0] * 20 + [1] * 20


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_shares_of_the_processes_make_up_the_order_of_one(world_size: int) -> None:
    shares = [keys(40, 12, stop_step=7, rank=rank, world_size=world_size) for rank in range(world_size)]
    per_step = 12 // world_size
    together = [
        key for step in range(7) for share in shares for key in share[step * per_step : (step + 1) * per_step]
    ]
    assert together == keys(40, 12, stop_step=7)


@pytest.mark.parametrize("start", [1, 3, 4, 8])
def test_resuming_is_an_offset(start: int) -> None:
    assert keys(17, 4, start_step=start, stop_step=10) == keys(17, 4, stop_step=10)[4 * start :]


@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_micro_batches_cut_the_same_order(micro_batch: int) -> None:
    stream = EpochStream(
        40, 12, seed=0, start_step=0, stop_step=3, micro_batch=micro_batch, rank=1, world_size=2
    )
    cut = list(stream)
    assert len(stream) == len(cut) == 3 * 6 // micro_batch
    assert {len(part) for part in cut} == {micro_batch}
    assert list(itertools.chain.from_iterable(cut)) == keys(40, 12, stop_step=3, rank=1, world_size=2)


def test_a_source_smaller_than_the_batch_is_gone_through_again() -> None:
    stream = EpochStream(3, 8, seed=0, start_step=0, stop_step=1)
    assert stream.steps_per_epoch == 1
    epoch = keys(3, 8, stop_step=1)
    assert sorted(Counter(key.image for key in epoch).values()) == [2, 3, 3]
    assert len(set(epoch)) == 8  # each time another sample of the image


def test_repeated_augmentation_shows_fewer_images_more_often() -> None:
    epoch = keys(12, 6, stop_step=2, repeats=3)
    assert set(Counter(key.image for key in epoch).values()) == {3}
    assert [key.repeat for key in epoch] == [0, 1, 2] * 4
    assert len(set(epoch)) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "batch_size 16 is not a multiple of the 3 processes; use 15"),
        ({"micro_batch": 3, "world_size": 2}, "micro_batch 3 does not divide the 8 images"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keys(40, 16, **options)


def official_epoch(count: int, replicas: int) -> list[list[int]]:
    """deit/samplers.py: indices of each process, without the shuffle."""
    repeated = [image for image in range(count) for _ in range(3)]
    total = -(-count * 3 // replicas) * replicas
    repeated += repeated[: total - len(repeated)]
    return [repeated[rank::replicas][: count // 256 * 256 // replicas] for rank in range(replicas)]


def test_repeated_augmentation_keeps_the_length_of_the_epoch() -> None:
    """The released sampler shows 768 of 1000 samples, and none of fewer than 256 images."""
    assert len(official_epoch(1000, 1)[0]) == 768
    assert official_epoch(200, 1) == [[]]
    stream = EpochStream(1000, 32, seed=0, start_step=0, stop_step=1, rank=0, world_size=1, repeats=3)
    assert stream.steps_per_epoch == 1000 // 32
    assert len(keys(1000, 32, stop_step=31, repeats=3)) == 31 * 32
    few = keys(200, 32, stop_step=6, repeats=3)
    assert len(set(few)) == 192
    assert {key.epoch for key in few} == {0}
    smallest = keys(5, 4, stop_step=3, repeats=3)
    assert len(set(smallest)) == 12


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_repeated_augmentation_does_not_depend_on_the_processes(world_size: int) -> None:
    """Each global batch has the same samples; the released sampler needs several processes for that."""
    shares = [
        keys(100, 12, stop_step=8, repeats=3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    per_step = 12 // world_size
    for step in range(8):
        batch = [key for share in shares for key in share[step * per_step : (step + 1) * per_step]]
        assert batch == keys(100, 12, stop_step=8, repeats=3)[step * 12 : (step + 1) * 12]
        assert set(Counter(key.image for key in batch).values()) == {3}


def test_repeated_augmentation_comes_to_all_images_over_the_epochs() -> None:
    """A third of the images an epoch, as published, but another third each time."""
    epochs = 30
    seen = keys(60, 6, stop_step=10 * epochs, repeats=3)
    thirds = [{key.image for key in seen if key.epoch == epoch} for epoch in range(epochs)]
    assert {len(third) for third in thirds} == {20}
    assert len(set().union(*thirds)) == 60
