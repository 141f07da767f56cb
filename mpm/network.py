"""A trained network with its preprocessing, out of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpm import build, checkpoint, partial
from mpm.backbones.attention_maps import AttentionMaps, Query, attention_maps
from mpm.backbones.backbone import Backbone, Encoded
from mpm.backbones.classifier import Classifier
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.config import FinetuneConfig, ImportedConfig, PretrainConfig
from mpm.data.images import read_image
from mpm.data.loading import stack
from mpm.data.views import EvalView
from mpm.partial import better_weights
from mpm.patchify.pixels import Normalize, to_unit
from mpm.trunk import NetworkConfig, config_of, part_of, trunk_of
from mpm.variants import Architecture


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
    def depth(self) -> int:
        """Blocks that can be told apart; 0 of a model of timm."""
        return 0 if self._architecture is None else self.backbone.depth

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
    trunk = trunk_of(
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
    size = image_size or data.image_size
    classifier = build.timm_classifier(
        empty, image_size=data.image_size, channels=data.channels, num_classes=len(classes)
    )
    classifier.load_state_dict(part_of(better_weights(saved), "classifier"))
    build.fit_timm(classifier.backbone, size, name=f"{saved.path}", key="image_size")
    return Network(
        cast(Any, classifier.backbone),  # what others read of a `Backbone`, it has not
        architecture=None,
        norm=nn.Identity(),
        normalize=Normalize(*build.statistics(data.mean, data.std)),
        view=EvalView(size, crop=data.test_crop, interpolation=data.interpolation),
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
