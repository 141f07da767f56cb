"""Networks out of checkpoints: what a file holds, and a network with its preprocessing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mpm import build, checkpoint, configfile, partial
from mpm.backbones.adapt import adapt_state
from mpm.backbones.attention_maps import AttentionMaps, Query, attention_maps
from mpm.backbones.backbone import Backbone, Encoded
from mpm.backbones.classifier import Classifier
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.config import Backbone as BackboneConfig
from mpm.config import FinetuneConfig, ImportedConfig, PretrainConfig, Readout
from mpm.data.images import read_image
from mpm.data.loading import stack
from mpm.data.views import EvalView
from mpm.imported import fetch, imported_config
from mpm.partial import better_weights, is_checkpoint
from mpm.patchify.patches import grid_of
from mpm.patchify.pixels import Normalize, to_unit
from mpm.variants import Architecture

__all__ = ["Network", "Trunk", "config_of", "holds_timm", "is_checkpoint", "load", "part_of", "read_trunk"]


NetworkConfig = PretrainConfig | FinetuneConfig | ImportedConfig


class Trunk(NamedTuple):
    """A backbone as a checkpoint holds it, with what read it.

    Attributes:
        path: of the checkpoint, or where else it came from.
        step: finished steps; 0 of weights that others trained.
        backbone: its configuration.
        image_size: height and width it was trained at, in pixels.
        channels: of the images.
        mean: per channel, in [0,1].
        std: per channel, in [0,1].
        interpolation: of an image to its size.
        readout: what a classifier reads; None: it is pretrained.
        classes: their names; none where they are not known, as in published files.
        num_classes: of the classifier; 0: it is pretrained.
        state: everything in the file by part: "backbone", "predictor", "readout", "heads".
    """

    path: Path
    step: int
    backbone: BackboneConfig
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    readout: Readout | None
    classes: tuple[str, ...]
    num_classes: int
    state: dict[str, dict[str, Tensor]]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per side (rows, columns)."""
        return grid_of(self.image_size, self.backbone.resolved().patch_size)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All of the state, named from the parts on."""
        return {
            f"{part}.{name}": tensor for part, held in self.state.items() for name, tensor in held.items()
        }

    @property
    def norm(self) -> dict[str, Tensor]:
        """State of the norm that reads tokens; empty where a mean or class attention is normed."""
        reads_tokens = self.readout is not None and self.readout.kind == "token"
        return part_of(self.state["readout" if reads_tokens else "predictor"], "norm")

    def backbone_at(self, image_size: tuple[int, int]) -> Backbone:
        """The backbone with its weights, for images of a size."""
        built = build.backbone(self.backbone, image_size=image_size, channels=self.channels)
        built.load_state_dict(self.weights_for(built, channels=self.channels))
        return built

    def classifier_at(self, image_size: tuple[int, int]) -> Classifier:
        """The classifier with its weights, for images of a size.

        Raises:
            ValueError: if it knows no classes.
        """
        if self.readout is None or not self.num_classes:
            raise ValueError(f"{self.path} is of pretraining and has no classes; fine-tune it first")
        built = Classifier(
            self.backbone_at(image_size),
            build.readout(self.readout, self.backbone),
            num_classes=self.num_classes,
        )
        for part in ("readout", "heads"):
            built.get_submodule(part).load_state_dict(self.state[part])
        return built

    def weights_for(self, backbone: Backbone, *, channels: int) -> dict[str, Tensor]:
        """The backbone's weights, adapted to another grid, other channels, and a relative bias per block."""
        return adapt_state(
            self.state["backbone"],
            grids=(self.grid, backbone.grid),
            channels=(self.channels, channels),
            depth=backbone.depth if len(backbone.relative_biases) > 1 else 0,
        )


def read_trunk(source: str | Path) -> Trunk:
    """The backbone of a checkpoint, of published weights, or of a model of timm.

    Args:
        source: a run's or a checkpoint's folder, a folder of `mpm import`, a file or folder of published
            weights (see `mpm.interop.load_official`), or `timm:NAME`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is broken, or not understood.
    """
    if not is_checkpoint(source):
        official = fetch(source)
        config = imported_config(official, source=source)
        return _trunk(config, official.state, path=Path(source), classes=official.config["classes"])
    saved = partial.load(Path(source).expanduser())
    classes = tuple(saved.metadata.get("classes", ()))
    return _trunk(config_of(saved), better_weights(saved), path=saved.path, step=saved.step, classes=classes)


def holds_timm(source: str | Path) -> bool:
    """Whether it is a run of fine-tuning that trained a model of timm.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is broken, or not understood.
    """
    if not is_checkpoint(source):
        return False
    config = config_of(checkpoint.load(Path(source).expanduser()))
    return isinstance(config, FinetuneConfig) and config.network is not None


def _trunk(
    config: NetworkConfig,
    state: dict[str, Tensor],
    *,
    path: Path,
    step: int = 0,
    classes: tuple[str, ...] = (),
) -> Trunk:
    data = config.data
    if isinstance(config, FinetuneConfig) and config.network is not None:
        raise ValueError(
            f"{path} is timm's {config.network.model}, whose weights have no place in a backbone of mpm; "
            "it can be evaluated, and teach: distillation.teacher={kind: checkpoint, checkpoint: ...}"
        )
    assert config.backbone is not None and data.image_size is not None and data.channels is not None
    assert data.mean is not None and data.std is not None
    mean, std = build.statistics(data.mean, data.std)
    known = config.num_classes if isinstance(config, ImportedConfig) else len(classes)
    return Trunk(
        path=path,
        step=step,
        backbone=config.backbone,
        image_size=data.image_size,
        channels=data.channels,
        mean=mean,
        std=std,
        interpolation=data.interpolation,
        readout=None if isinstance(config, PretrainConfig) else config.readout,
        classes=classes,
        num_classes=known or 0,
        state={part: part_of(state, part) for part in ("backbone", "predictor", "readout", "heads")},
    )


def part_of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The state dict of a part of an objective, which may lie in its classifier."""
    prefixes = (f"{part}.", f"classifier.{part}.")
    return {name[len(p) :]: t for name, t in state.items() for p in prefixes if name.startswith(p)}


def config_of(saved: checkpoint.Checkpoint) -> NetworkConfig:
    """The resolved configuration of a checkpoint.

    Raises:
        ValueError: if it holds a tokenizer.
    """
    kinds: dict[str, type[NetworkConfig]] = {
        "pretrain": PretrainConfig,
        "finetune": FinetuneConfig,
        "imported": ImportedConfig,
    }
    kind = saved.metadata["kind"]
    if kind not in kinds:
        raise ValueError(
            f"{saved.path} is a {kind}, not a network; it is what objective.target.tokenizer takes"
        )
    return configfile.validate(saved.config, kinds[kind], name=str(saved.path))


class Network(nn.Module):
    """A trained network with its preprocessing, in eval mode; it never masks.

    Attributes:
        backbone: the encoder.
        classifier: with a readout and heads; None: pretrained only.
        classes: names of the classes, in the order of the scores.
        image_size: height and width of the images it gets, in pixels.
        channels: of them.
        view: resizes and crops an image [C,H,W] to what the network gets.
        reading: how files become images: arguments of `read_image` and `FolderImages`.
        step: finished steps of the checkpoint.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        architecture: Architecture | None,
        norm: nn.Module,
        normalize: Normalize,
        view: EvalView,
        reading: dict[str, Any],
        step: int,
        classifier: Classifier | TimmClassifier | None = None,
        classes: tuple[str, ...] = (),
    ):
        super().__init__()
        self.backbone = backbone
        self._architecture = architecture
        self.norm = norm
        self.normalize = normalize
        self.view = view
        self.image_size = view.image_size
        self.reading = reading
        self.channels: int = reading["channels"]
        self.step = step
        self.classifier = classifier
        self.classes = classes
        self.eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What a classifier reads; of a pretrained network, the mean of the normalised patch tokens.

        Args:
            images: [B,C,H,W] of the network's size, uint8 or float32 in [0,1].

        Returns: float32 [B,D].
        """
        if isinstance(self.classifier, TimmClassifier):
            return self.classifier.vectors(self._input(images))[:, 0]
        return self.features_of(self.encode(images))

    def features_of(self, encoded: Encoded) -> Tensor:
        """Likewise [B,D], of what `encode` gave."""
        if isinstance(self.classifier, Classifier):
            return self.classifier.readout(encoded)[:, 0]
        return self.norm(encoded.patches).mean(1)

    @torch.no_grad()
    def encode(self, images: Tensor, *, layers: Sequence[int] = ()) -> Encoded:
        """The residual stream after the last block, and after the blocks with the indices `layers`.

        Args:
            images: [B,C,H,W] of the network's size, uint8 or float32 in [0,1].
            layers: see `Backbone.encode`.

        Raises:
            ValueError: if it is a model of timm, which has no such blocks.
        """
        assert self.architecture
        return self.backbone.encode(self.backbone.embed(self._input(images)), layers=layers)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Probabilities of the classes.

        Args:
            images: [B,C,H,W] of the network's size, uint8 or float32 in [0,1].

        Returns: float32 [B,L].

        Raises:
            ValueError: if the checkpoint is of pretraining.
        """
        return self.logits(images).softmax(1)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logarithms of the probabilities, but for a constant: arguments and errors as in `predict`."""
        if self.classifier is None:
            raise ValueError("this checkpoint is of pretraining and has no classes; fine-tune it first")
        return self.classifier.predict(self._input(images))

    @torch.no_grad()
    def attention(self, images: Tensor, *, query: Query | None = None) -> AttentionMaps:
        """Where the network looks for what it gives, see `attention_maps`.

        Args:
            images: [B,C,H,W] of the network's size, uint8 or float32 in [0,1].
            query: "class_token" or "patches"; None: what `features` are of.

        Raises:
            ValueError: if it is a model of timm.
        """
        assert self.architecture
        readout = self.classifier.readout if isinstance(self.classifier, Classifier) else None
        return attention_maps(self.backbone, self._input(images), readout=readout, query=query)

    def read(self, path: str | Path) -> Tensor:
        """An image file as [C,H,W], in the depth and with the channels of the training images.

        Raises:
            ValueError: if it cannot be read, or its channels or values do not fit.
        """
        return read_image(path, **self.reading)

    def preprocess(self, images: Sequence[Tensor]) -> Tensor:
        """Images [C,H,W] of any size as one batch [B,C,h,w]."""
        return stack([self.view(image) for image in images])

    @property
    def architecture(self) -> Architecture:
        """Of the backbone.

        Raises:
            ValueError: if it is a model of timm.
        """
        if self._architecture is None:
            raise ValueError(
                "this checkpoint is a whole model of timm, which tells its classes and features only"
            )
        return self._architecture

    def _input(self, images: Tensor) -> Tensor:
        return self.normalize(to_unit(images, self.normalize.mean.device))


def load(
    path: str | Path, *, image_size: tuple[int, int] | None = None, device: str | torch.device = "cpu"
) -> Network:
    """The network of a checkpoint, ready to use.

    Args:
        path: a run's folder (its best checkpoint, else its newest) or a checkpoint's.
        image_size: height and width in pixels; positions are resampled as for fine-tuning at another size.
            None: that of training.
        device: where it runs.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is broken, or a side is not a multiple of the patch.
    """
    saved = partial.load(path)
    config = config_of(saved)
    weights = better_weights(saved)
    if isinstance(config, FinetuneConfig) and config.network is not None:
        return _timm_network(saved, config, image_size).to(device)
    trunk = _trunk(
        config,
        weights,
        path=saved.path,
        step=saved.step,
        classes=tuple(saved.metadata.get("classes", ())),
    )
    classifier: Classifier | None = None
    image_size = image_size or trunk.image_size
    if trunk.readout is not None and trunk.num_classes:
        classifier = trunk.classifier_at(image_size)
        backbone, norm = classifier.backbone, classifier.readout.norm
    else:
        backbone = trunk.backbone_at(image_size)
        norm = nn.LayerNorm(backbone.dim, eps=1e-6)
        norm.load_state_dict(trunk.norm)
    crop = 1.0 if isinstance(config, PretrainConfig) else config.data.test_crop
    network = Network(
        backbone,
        architecture=trunk.backbone.resolved(),
        norm=norm,
        normalize=Normalize(trunk.mean, trunk.std),
        view=EvalView(image_size, crop=crop, interpolation=config.data.interpolation),
        reading={"channels": trunk.channels, **_depth(config)},
        step=saved.step,
        classifier=classifier,
        classes=trunk.classes or tuple(map(str, range(trunk.num_classes))),
    )
    return network.to(device)


def _timm_network(
    saved: checkpoint.Checkpoint, config: FinetuneConfig, image_size: tuple[int, int] | None
) -> Network:
    data, classes = config.data, tuple(saved.metadata["classes"])
    assert config.network is not None and data.image_size is not None and data.channels is not None
    assert data.mean is not None and data.std is not None
    empty = config.network.model_copy(update={"pretrained": False})
    classifier = build.timm_classifier(empty, channels=data.channels, num_classes=len(classes))
    classifier.load_state_dict(part_of(better_weights(saved), "classifier"))
    return Network(
        cast(Any, classifier.backbone),  # what others read of a `Backbone`, it has not
        architecture=None,
        norm=nn.Identity(),
        normalize=Normalize(*build.statistics(data.mean, data.std)),
        view=EvalView(image_size or data.image_size, crop=data.test_crop, interpolation=data.interpolation),
        reading={"channels": data.channels, **_depth(config)},
        step=saved.step,
        classifier=classifier,
        classes=classes,
    )


def _depth(config: NetworkConfig) -> dict[str, Any]:
    """What the training images were read with, beside their channels."""
    if isinstance(config, ImportedConfig):
        return {}
    source = config.data if isinstance(config, PretrainConfig) else config.data.train
    return source.model_dump(include={"background", "max_value"})
