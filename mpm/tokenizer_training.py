"""Training a tokenizer as an experiment: what a configuration of one becomes."""

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from mpm import build
from mpm.config import (
    FeatureInput,
    HOGTeacher,
    KMeansObjective,
    NetworkTeacher,
    PixelTeacher,
    TokenizerConfig,
    VQKDObjective,
)
from mpm.experiment import Parts
from mpm.imported import TIMM
from mpm.interop.timm_hub import OutOfReach, create_timm
from mpm.monitoring import CodeMonitor
from mpm.objectives import teachers
from mpm.objectives.prepare import PrepareTokenizer
from mpm.patchify.pixels import Normalize
from mpm.tokenization import digest
from mpm.trunk import Trunk, present, read_trunk

__all__ = ["TokenizerTraining"]

_MOST_CODES = 0.1  # of the patches; with more, a centroid is hardly more than some patch


class TokenizerTraining:
    """Reads what the configuration names, and states all of it.

    Attributes:
        kind: "tokenizer".
        config: resolved.
        images: the training images.
        identity: of the network that is the teacher, where there is one.

    Raises:
        ValueError: if what it names does not fit.
        FileNotFoundError: if it is not there.
    """

    kind = "tokenizer"

    def __init__(self, config: TokenizerConfig):
        data, objective, backbone = config.data, config.objective, config.backbone
        images = build.source(data, image_size=data.image_size, channels=data.channels, labelled=False)
        self._network: Trunk | None = None
        mean, std = data.mean or "imagenet", data.std or "imagenet"
        if isinstance(objective, KMeansObjective) and isinstance(objective.input, FeatureInput):
            self._network = network = read_trunk(
                present(objective.input.network, key="objective.input.network")
            )
            backbone = network.backbone if backbone is None else backbone.over(network.backbone)
            if network.channels != data.channels:
                raise ValueError(
                    f"objective.input.network {objective.input.network} takes {network.channels} channel(s); "
                    f"set data.channels={network.channels}"
                )
            mean, std = data.mean or network.mean, data.std or network.std
        numbers = build.statistics(mean, std, images)
        config = config.model_copy(
            update={
                "backbone": None if backbone is None else backbone.in_full(classifier=False),
                "data": data.model_copy(update={"mean": numbers[0], "std": numbers[1]}),
            }
        )
        stride = config.stride
        assert stride is not None
        self.grid = data.image_size[0] // stride[0], data.image_size[1] // stride[1]
        self._fitting_codes = build.default_codes(len(images), self.grid[0] * self.grid[1])
        codes = objective.codes or self._fitting_codes
        self.config = config.model_copy(update={"objective": objective.model_copy(update={"codes": codes})})
        self.images = images
        self.identity: dict[str, str] = {}
        self._teacher = self._read_teacher()

    def create(self, device: torch.device, *, is_new: bool) -> Parts:
        """See `Experiment`."""
        config, data = self.config, self.config.data
        assert isinstance(data.mean, tuple) and isinstance(data.std, tuple)
        teacher = None if self._teacher is None else self._teacher.to(device)
        tokenizer = build.tokenizer(config, Normalize(data.mean, data.std))
        objective = build.tokenizer_objective(
            config, tokenizer, feature_dim=None if teacher is None else teacher.dim
        ).to(device)
        if self._network is not None and is_new:
            network = cast(Any, tokenizer)
            weights = self._network.weights_for(network.backbone, channels=data.channels)
            kept = network.backbone.state_dict().keys()  # without the blocks above the layer
            network.backbone.load_state_dict({name: weights[name] for name in kept})
            # An inner layer's norm has no weights. That of the last keeps 1 and 0, and so standardises, where
            # the network norms no patch tokens itself: it reads their mean, or by class attention.
            if network.norm.state_dict() and self._network.norm:
                network.norm.load_state_dict(self._network.norm)
        monitor = CodeMonitor(config, self.images, device=device)
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        return Parts(
            objective=objective,
            prepare=PrepareTokenizer(teacher, device=device),
            view=build.pretrain_view(config),
            look=lambda: monitor.look(objective),
            macs=None,
            facts={"parameters": f"{trained:,}", "codes": self._codes_in_words()},
        )

    def _codes_in_words(self) -> str:
        """How many codes and where, and whether that is many for the images."""
        codes, (rows, columns) = self.config.objective.codes, self.grid
        assert codes is not None
        words = f"{codes:,}, {rows}x{columns} for an image"
        patches = len(self.images) * rows * columns
        if codes <= max(patches * _MOST_CODES, self._fitting_codes):
            return words
        return (
            f"{words}; that is more than {_MOST_CODES:.0%} of the {patches:,} patches there are, "
            f"objective.codes=null would take {self._fitting_codes}"
        )

    def _read_teacher(self) -> Any:
        """On the CPU; None: there is none. States its identity."""
        config = self.config
        if not isinstance(config.objective, VQKDObjective):
            return None
        assert config.backbone is not None
        patch_size, channels = config.backbone.resolved().patch_size, config.data.channels
        match config.objective.teacher:
            case PixelTeacher():
                return teachers.PixelTeacher(patch_size, channels=channels)
            case HOGTeacher(cells=cells):
                return teachers.HOGTeacher(patch_size, channels=channels, cells=cells)
            case NetworkTeacher(checkpoint=source):
                try:
                    read = _network_teacher(source, self.grid, dtype=build.dtype(config.optim))
                except OutOfReach as error:
                    raise ValueError(
                        f"{error}; objective.teacher.kind=hog and pixels need no download"
                    ) from error
                theirs = read.teacher.channels
                if channels not in (1, theirs):
                    grey = "" if theirs == 1 else ", or 1: grey images are repeated"
                    raise ValueError(
                        f"objective.teacher.checkpoint {source} takes {theirs} channel(s), and data.channels "
                        f"is {channels}; set data.channels={theirs}{grey}"
                    )
                self.identity["objective.teacher.checkpoint"] = read.identity
                return read.teacher


class _Read(NamedTuple):
    """A teacher, and the digest of its weights before they were resampled, which rounds by the machine."""

    teacher: teachers.NetworkTeacher
    identity: str


def _network_teacher(source: str, grid: tuple[int, int], *, dtype: torch.dtype) -> _Read:
    """Any model of timm with its published weights, or the backbone of a checkpoint, on a grid."""
    if source.startswith(TIMM):
        network = create_timm(source.removeprefix(TIMM))
        identity = digest(network)
        normalize = teachers.published_normalize(network)
        return _Read(teachers.NetworkTeacher(network, grid=grid, normalize=normalize, dtype=dtype), identity)
    trunk = read_trunk(present(source, key="objective.teacher.network"))
    patch_height, patch_width = trunk.backbone.resolved().patch_size
    sizes = trunk.image_size, (grid[0] * patch_height, grid[1] * patch_width)
    own, fitted = (trunk.backbone_at(size) for size in sizes)
    norm = None
    if trunk.norm:
        norm = nn.LayerNorm(own.dim, eps=1e-6)
        norm.load_state_dict(trunk.norm)
    teacher = teachers.NetworkTeacher(
        fitted, grid=grid, normalize=Normalize(trunk.mean, trunk.std), norm=norm, dtype=dtype
    )
    return _Read(teacher, digest(nn.ModuleList([own] if norm is None else [own, norm])))
