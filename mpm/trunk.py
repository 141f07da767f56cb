"""What a checkpoint or a file of weights holds of a network: its configuration and state, by part."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mpm import build, checkpoint, configfile, partial
from mpm.backbones.adapt import adapt_state
from mpm.backbones.backbone import Backbone
from mpm.backbones.classifier import Classifier
from mpm.config import Backbone as BackboneConfig
from mpm.config import FinetuneConfig, ImportedConfig, Init, PretrainConfig, Readout
from mpm.imported import TIMM, fetch, imported_config
from mpm.partial import better_weights, is_checkpoint
from mpm.patchify.patches import grid_of

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


def present(source: str, *, key: str) -> str:
    """What a configuration names to start from, if it is there.

    Raises:
        FileNotFoundError: naming its `key`.
    """
    if not source.startswith(TIMM) and not Path(source).expanduser().exists():
        raise FileNotFoundError(
            f"{key}: no checkpoint {source}; give a run's folder, a file of weights, or {TIMM}NAME"
        )
    return source


def read_start(init: Init | None) -> Trunk | None:
    """What a run starts from; None: from scratch.

    Raises:
        FileNotFoundError, ValueError: as `present` and `read_trunk`.
    """
    return None if init is None else read_trunk(present(init.checkpoint, key="init.checkpoint"))


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
        return trunk_of(config, official.state, path=Path(source), classes=official.config["classes"])
    saved = partial.load(Path(source).expanduser())
    classes = tuple(saved.metadata.get("classes", ()))
    return trunk_of(
        config_of(saved), better_weights(saved), path=saved.path, step=saved.step, classes=classes
    )


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


def trunk_of(
    config: NetworkConfig,
    state: dict[str, Tensor],
    *,
    path: Path,
    step: int = 0,
    classes: tuple[str, ...] = (),
) -> Trunk:
    """A trunk of what was loaded already.

    Raises:
        ValueError: if it is a model of timm.
    """
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
