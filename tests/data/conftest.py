"""A small source in memory, of which some images can be broken."""

from collections.abc import Callable, Collection

import pytest
import torch

from mpm.data.images import UnreadableImage


class MemoryImages:
    """Noise of any shape; image `i` has label `i % num_classes` and the top left pixel `i % 251`."""

    def __init__(self, count: int, shape: tuple[int, ...], num_classes: int, broken: Collection[int]):
        self.pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
        self.pixels[:, :, 0, 0] = (torch.arange(count) % 251)[:, None]
        self.broken = frozenset(broken)
        self.classes = tuple(f"class {number}" for number in range(num_classes)) or None

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise UnreadableImage(f"cannot read {self.name(index)}: broken on purpose")
        return self.pixels[index]

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def name(self, index: int) -> str:
        return f"memory/{index}"


@pytest.fixture
def memory_images() -> Callable[..., MemoryImages]:
    def create(
        count: int,
        shape: tuple[int, ...] = (1, 12, 10),
        *,
        num_classes: int = 0,
        broken: Collection[int] = (),
    ) -> MemoryImages:
        return MemoryImages(count, shape, num_classes, broken)

    return create
