"""What the pretraining loop is given: an objective, and all that comes with it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mpm.data.datasets import ImageSource
from mpm.data.rows import RowCache
from mpm.data.views import PretrainView

__all__ = ["Experiment", "Look", "Parts"]


class Look(NamedTuple):
    """What is seen of an objective between two steps.

    Attributes:
        signals: numbers by name.
        picture: uint8 [3,H,W]; None on other processes than the main one, and where none is drawn.
        code_counts: uses of each code [V]; None where it has none.
    """

    signals: dict[str, float]
    picture: Tensor | None
    code_counts: Tensor | None = None


class Parts(NamedTuple):
    """What an experiment trains, and what it needs for that.

    Attributes:
        objective: on the device.
        prepare: batch -> inputs of the objective.
        view: of the images.
        look: every process calls it, and gets what is seen.
        macs: multiply-accumulates of a forward pass for an image; None: not counted.
        facts: what is told at the start.
        crops: see `ViewDataset`.
        codes: see `ViewDataset`.
    """

    objective: nn.Module
    prepare: Callable[[Any], Any]
    view: PretrainView
    look: Callable[[], Look]
    macs: int | None
    facts: dict[str, str]
    crops: int | None = None
    codes: RowCache | None = None


class Experiment(Protocol):
    """What is learned from unlabelled images.

    Attributes:
        kind: of its checkpoints.
        config: everything in it stated.
        images: to learn from.
        identity: digests of frozen networks by the key that names them, and what else a continued run must
            find as it was.
    """

    kind: str
    config: Any
    images: ImageSource
    identity: dict[str, str]

    def create(self, device: torch.device, *, is_new: bool) -> Parts:
        """The parts, with fresh parameters; weights to start from are read where the run `is_new`."""
        ...
