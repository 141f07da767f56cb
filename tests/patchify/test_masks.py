import math
import random

import numpy as np
import pytest
import torch

from mpm.patchify.masks import BlockMask, MaskSampler, PatchMask, RandomMask, take
from tests.networks import random_mask

SAMPLERS: dict[str, tuple[MaskSampler, int]] = {
    "random": (RandomMask((14, 14), count=147), 196),
    "random-wide": (RandomMask((2, 5), count=1), 10),
    "random-unit2": (RandomMask((14, 14), count=120, unit=2), 196),
    "random-unit3": (RandomMask((3, 6), count=9, unit=3), 18),
    "block": (BlockMask((14, 14), count=75), 196),
    "block-wide": (BlockMask((4, 9), count=14, min_area=4), 36),
    "block-most": (BlockMask((5, 5), count=24, min_area=1), 25),
    "block-row": (BlockMask((1, 8), count=3, min_area=1), 8),  # no block fits: all is topped up
}


def test_true_is_masked_and_indices_ascend() -> None:
    mask = PatchMask.from_bool(torch.tensor([[True, False, True, False], [False, False, True, True]]), 2)
    assert mask.masked.tolist() == [[0, 2], [2, 3]]
    assert mask.visible.tolist() == [[1, 3], [0, 1]]


def test_from_bool_splits_any_mask() -> None:
    hidden = torch.rand(16, 300).argsort(1) < 210
    mask = PatchMask.from_bool(hidden, 210)
    for row, visible, masked in zip(hidden, mask.visible, mask.masked, strict=True):
        assert torch.equal(masked, row.nonzero().squeeze(1))
        assert torch.equal(visible, (~row).nonzero().squeeze(1))


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (3, 12, 4, 2)])
def test_take_equals_a_loop(shape) -> None:
    x, mask = torch.randn(shape), random_mask(3, 12, 7)
    assert torch.equal(mask.take_visible(x), torch.stack([x[b][mask.visible[b]] for b in range(3)]))
    assert torch.equal(mask.take_masked(x), torch.stack([x[b][mask.masked[b]] for b in range(3)]))
    repeated = torch.tensor([[0, 0], [3, 1], [11, 3]])
    assert torch.equal(take(x, repeated), torch.stack([x[b][repeated[b]] for b in range(3)]))


def test_fill_undoes_take() -> None:
    x, token, mask = torch.randn(3, 12, 5), torch.randn(5), random_mask(3, 12, 7)
    filled = mask.fill(mask.take_visible(x), token)
    assert torch.equal(mask.take_visible(filled), mask.take_visible(x))
    assert torch.equal(mask.take_masked(filled), token.expand(3, 7, 5))


def test_fill_sends_gradients_to_both() -> None:
    visible, token = torch.randn(3, 5, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    random_mask(3, 12, 7).fill(visible, token).sum().backward()
    assert torch.equal(visible.grad, torch.ones(3, 5, 4))
    assert torch.equal(token.grad, torch.full((4,), 3 * 7.0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_mask_hides_exactly_count(name: str, rng: np.random.Generator) -> None:
    sampler, patches = SAMPLERS[name]
    for _ in range(200):
        mask = sampler(rng)
        assert mask.dtype == bool
        assert mask.shape == (patches,)
        assert mask.sum() == sampler.count


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mask_is_a_function_of_the_generator(name: str) -> None:
    sampler, _ = SAMPLERS[name]
    draws = [sampler(np.random.default_rng(seed)).tobytes() for seed in (0, 1, 2, 3)]
    assert draws == [sampler(np.random.default_rng(seed)).tobytes() for seed in (0, 1, 2, 3)]
    assert len(set(draws)) > 1


@pytest.mark.parametrize("unit", [1, 2])
def test_random_masks_are_uniform(unit: int, rng: np.random.Generator) -> None:
    sampler = RandomMask((4 * unit, 3 * unit), count=5 * unit**2, unit=unit)
    draws = 3000
    share = sum(sampler(rng).astype(float) for _ in range(draws)) / draws
    deviation = np.sqrt(5 / 12 * 7 / 12 / draws)
    assert np.abs(share - 5 / 12).max() < 4 * deviation  # of 12 independent frequencies, 1 in 1300 seeds


@pytest.mark.parametrize("unit", [2, 3])
def test_units_are_hidden_whole(unit: int, rng: np.random.Generator) -> None:
    sampler = RandomMask((4 * unit, 2 * unit), count=3 * unit**2, unit=unit)
    for _ in range(20):
        blocks = sampler(rng).reshape(4, unit, 2, unit).mean((1, 3))
        assert np.isin(blocks, (0.0, 1.0)).all()


def test_pairs_of_patches_are_hidden_independently(rng: np.random.Generator) -> None:
    """Not only each patch: every subset is as likely as any other."""
    sampler = RandomMask((2, 3), count=2)
    counts: dict[bytes, int] = {}
    for _ in range(3000):
        key = sampler(rng).tobytes()
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 15
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 36.1  # 99.9 % of the distribution with 14 degrees of freedom


def _published_count(min_area: int) -> int:
    """What the reference hides in a draw of 75 on 14x14: the published loop over Python's random."""
    hidden: set[tuple[int, int]] = set()
    while len(hidden) < 75:
        most, new = 75 - len(hidden), set()
        for _ in range(10):
            area, aspect = (
                random.uniform(min_area, most),
                math.exp(random.uniform(math.log(0.3), -math.log(0.3))),
            )
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < 14 and width < 14:
                top, left = random.randint(0, 14 - height), random.randint(0, 14 - width)
                block = {(top + i, left + j) for i in range(height) for j in range(width)} - hidden
                if 0 < len(block) <= most:
                    new = block
                    break
        if not new:
            break
        hidden |= new
    return len(hidden)


@pytest.mark.parametrize(("min_area", "mean", "exact"), [(16, 74.47, 0.665), (4, 74.93, 0.928)])
def test_block_masks_have_the_published_statistics(min_area: int, mean: float, exact: float, rng) -> None:
    """Before the top-up. The numbers are of 150,000 draws of the reference, repeated here with fewer."""
    sampler = BlockMask((14, 14), count=75, min_area=min_area)
    ours = np.array([sampler.blocks(rng).sum() for _ in range(5000)])
    reference = np.array([_published_count(min_area) for _ in range(1000)])
    assert ours.max() == 75
    for counts, tolerance in [(ours, 0.02), (reference, 0.06)]:  # three and four deviations of a share
        assert counts.mean() == pytest.approx(mean, abs=0.15)  # four deviations of 1000 draws
        assert (counts == 75).mean() == pytest.approx(exact, abs=tolerance)


def test_the_top_up_keeps_the_blocks() -> None:
    sampler = BlockMask((14, 14), count=75)
    for seed in range(50):
        blocks = sampler.blocks(np.random.default_rng(seed)).reshape(-1)
        assert sampler(np.random.default_rng(seed))[blocks].all()


def test_block_masks_are_clustered(rng: np.random.Generator) -> None:
    """Neighbours are hidden together far more often than chance."""

    def agreement(sampler: MaskSampler) -> float:
        masks = np.stack([sampler(rng).reshape(14, 14) for _ in range(100)])
        return float((masks[:, :, 1:] & masks[:, :, :-1]).mean() / masks.mean())

    assert agreement(RandomMask((14, 14), count=75)) == pytest.approx(75 / 196, abs=0.02)
    assert agreement(BlockMask((14, 14), count=75)) > 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomMask((4, 4), count=0), "mask count 0 hides nothing of 16 patches; use 1 to 15"),
        (lambda: RandomMask((4, 4), count=16), "mask count 16 hides all of 16 patches; use 1 to 15"),
        (lambda: BlockMask((4, 4), count=17), "mask count 17 hides all of 16 patches; use 1 to 15"),
        (lambda: BlockMask((4, 4), count=-1), "mask count -1 hides nothing"),
        (
            lambda: RandomMask((7, 7), count=4, unit=2),
            r"mask unit 2 does not divide the grid 7x7; use one of \[1, 7\]",
        ),
        (
            lambda: RandomMask((4, 6), count=6, unit=2),
            r"mask count 6 is not a multiple of 4 \(unit 2 squared\)",
        ),
        (lambda: BlockMask((4, 4), count=8), "mask min_area 16 is not between 1 and count 8"),
        (lambda: BlockMask((4, 4), count=8, min_area=0), "mask min_area 0 is not between 1 and count 8"),
    ],
)
def test_masks_that_do_not_fit_are_told(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
