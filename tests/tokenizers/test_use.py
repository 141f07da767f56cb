"""How codes are used, against counting by hand.

Started by torchrun, this file is the program one of whose two processes has no images.
"""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpm import distributed
from mpm.tokenizers.use import CodeUse, code_use


class ByBrightness:
    """The code of a 2x4 patch is its brightness in four steps."""

    vocab_size, stride, channels, grid, interpolation = 6, (2, 4), 1, None, "bicubic"

    def encode(self, images: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(images, self.stride)
        return (4 * means).long().clamp(max=3).flatten(1)

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> None:
        return None


def test_counts_and_mean_patches_equal_a_loop() -> None:
    images = torch.rand(5, 1, 1, 1) * torch.rand(5, 1, 4, 8)
    tokenizer = ByBrightness()
    use = code_use(tokenizer, images.split(2))
    counts, sums = Counter(), {}
    for image, codes in zip(images, tokenizer.encode(images).tolist(), strict=True):
        for place, code in enumerate(codes):
            top, left = 2 * (place // 2), 4 * (place % 2)
            counts[code] += 1
            sums[code] = sums.get(code, 0) + image[0, top : top + 2, left : left + 4]
    assert use.counts.tolist() == [counts[code] for code in range(6)]
    for code, total in sums.items():
        torch.testing.assert_close(use.patches[code].reshape(2, 4), total / counts[code])
    assert not use.patches[use.counts == 0].any()


def test_drawing_puts_each_codes_mean_patch_at_its_place() -> None:
    use = CodeUse(torch.ones(3), torch.arange(3.0)[:, None].expand(3, 8), (2, 4))
    drawn = use.draw(torch.tensor([[2, 0, 1, 1, 2, 0]]), (2, 3))
    assert drawn.shape == (1, 1, 4, 12)
    assert drawn[0, 0, ::2, ::4].tolist() == [[2, 0, 1], [1, 2, 0]]


@pytest.mark.parametrize(
    ("counts", "live", "perplexity", "frequent"),
    [
        ([5, 5, 5, 5], 1.0, 4.0, 0.25),
        ([20, 0, 0, 0], 0.25, 1.0, 1.0),
        ([2, 0, 0, 0, 0, 0, 0, 1], 2 / 3, math.exp(math.log(3) - 2 / 3 * math.log(2)), 2 / 3),
    ],
    ids=["even", "collapsed", "fewer patches than codes"],
)
def test_live_share_perplexity_and_frequent_share(
    counts: list[int], live: float, perplexity: float, frequent: float
) -> None:
    use = CodeUse(torch.tensor(counts, dtype=torch.float64), torch.zeros(len(counts), 1), (1, 1))
    assert use.live_share == pytest.approx(live)
    assert use.perplexity == pytest.approx(perplexity)
    assert use.frequent_share == pytest.approx(frequent)


def test_codes_that_do_not_occur_are_drawn_as_the_mean_of_all_patches() -> None:
    images = torch.rand(5, 1, 4, 8)
    use = code_use(ByBrightness(), images.split(2))
    assert use.counts[5] == 0
    drawn = use.draw(torch.tensor([[5, 5]]), (2, 1))
    torch.testing.assert_close(
        drawn[0, 0, 2:], images.unflatten(3, (2, 4)).unflatten(2, (2, 2)).mean((0, 1, 2, 4))
    )


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        code_use(ByBrightness(), [])


@pytest.mark.torchrun
def test_a_process_without_images_takes_part() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--module", "tests.tokenizers.test_use"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def compare_with_one_process() -> None:
    """The first has all images, the other none; then neither has one."""
    images = torch.rand(3, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    use = code_use(ByBrightness(), [images] if distributed.is_main() else [])
    assert torch.equal(use.counts, torch.bincount(ByBrightness().encode(images).flatten(), minlength=6))
    with pytest.raises(ValueError, match="no images"):
        code_use(ByBrightness(), [])


if __name__ == "__main__":
    distributed.start("cpu", threads=1, timeout_s=60)
    compare_with_one_process()
    distributed.stop()
