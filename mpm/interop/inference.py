"""A network to give away: its weights, its facts, and the module that says what it computes."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from mpm.backbones.backbone import Backbone
from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_backbone, create_readout
from mpm.patchify.pixels import Normalize
from mpm.variants import Architecture

__all__ = ["Inference", "Subject", "Written", "inference_of"]


class Subject(NamedTuple):
    """What is exported.

    Attributes:
        config: facts as `load_official` gives them.
        state: mpm's weights: backbone, readout, heads, predictor.
        classes: names of the classes; none where they are not known.
        source: where it came from, for people.
        training: what transformers' config.json says of its pretraining: mask_ratio, norm_pix_loss.
        target: what the predictor predicts: "pixels", "codes", "hog" or "latent"; None: it is not known, as
            of published weights.
    """

    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    classes: Sequence[str] = ()
    source: str = "unknown"
    training: Mapping[str, Any] = MappingProxyType({})
    target: str | None = None

    @property
    def is_classifier(self) -> bool:
        """Whether it has classes; else it gives features."""
        return self.config["readout"] is not None and bool(self.config["num_classes"])

    @property
    def output(self) -> str:
        """Name of what it gives."""
        return "logits" if self.is_classifier else "features"


class Written(NamedTuple):
    """What a format made of a network.

    Attributes:
        run: what it computes of images float32 [B,C,H,W] in [0,1], loaded again from the disk.
        loading: Python lines that load it and use it.
        notes: what a user should know.
    """

    run: Callable[[Tensor], Tensor]
    loading: str
    notes: tuple[str, ...] = ()


class Inference(nn.Module):
    """Images to the logits of a classifier, or to the features of a pretrained network; it never masks.

    Features are the mean of the normalised patch tokens, as `mpm features` writes them.

    Args:
        backbone: the encoder.
        mean: per channel, in [0,1].
        std: per channel, in [0,1].
        classifier: holds the backbone; None: there are no classes.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        classifier: Classifier | None = None,
    ):
        super().__init__()
        self.normalize = Normalize(tuple(mean), tuple(std))
        self.classifier = classifier
        self.backbone = backbone
        self.norm = nn.LayerNorm(backbone.dim, eps=1e-6) if classifier is None else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> logits [B,L], or features [B,D]."""
        images = self.normalize(images)
        if self.classifier is not None:
            return self.classifier.predict(images)
        return self.norm(self.backbone(images).patches).mean(1)


def inference_of(subject: Subject) -> Inference:
    """The network in eval mode, in float32 on the CPU.

    Raises:
        ValueError: if it is pretrained and its final norm is missing.
    """
    config, state = subject.config, subject.state
    architecture = Architecture(**config["backbone"])
    backbone = create_backbone(architecture, image_size=config["image_size"], channels=config["channels"])
    classifier = None
    if subject.is_classifier:
        readout = create_readout(architecture, **config["readout"])
        classifier = Classifier(backbone, readout, num_classes=config["num_classes"])
        classifier.load_state_dict(_parts(state, "backbone.", "readout.", "heads."))
    network = Inference(backbone, mean=config["mean"], std=config["std"], classifier=classifier)
    if classifier is None:
        backbone.load_state_dict(_part(state, "backbone."))
        norm = _part(state, "predictor.norm.")
        if not norm and config["readout"] != {"kind": "mean"}:
            norm = _part(state, "readout.norm.")
        if not norm:
            raise ValueError(
                "the network has neither classes nor a norm of its tokens, so it gives no features"
            )
        network.norm.load_state_dict(norm)
    return network.float().eval().requires_grad_(False)


def _parts(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in _parts(state, prefix).items()}
