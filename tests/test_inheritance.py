"""What fine-tuning takes from a checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpm import build, inheritance
from mpm.data.datasets import SyntheticImages
from mpm.data.subsets import Subset
from mpm.inheritance import recalibrate_stem
from mpm.patchify.norms import TokenBatchNorm
from mpm.patchify.pixels import Normalize, to_unit
from tests.integration.settings import SCRATCH, finetune_config


def test_a_stem_is_recalibrated_on_images_of_all_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources lie in the order of their classes: the first images are of the first ones."""
    monkeypatch.setattr(inheritance, "_BATCH", 32)
    monkeypatch.setattr(inheritance, "_BATCHES", 4)
    config = finetune_config(tmp_path, *SCRATCH, "backbone.stem={kind: hmlp, norm: batch}")
    size, count = (32, 32), 640
    unsorted = SyntheticImages(count, image_size=size, channels=3, num_classes=10)
    images = Subset(unsorted, sorted(range(count), key=unsorted.label))
    network = build.classifier(config, config.backbone, image_size=size, channels=3, num_classes=10)
    normalize = Normalize((0.5,) * 3, (0.2,) * 3)
    stem = network.backbone.get_submodule("stem")
    norm = next(module for module in stem.modules() if isinstance(module, TokenBatchNorm))

    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().flatten(0, -2)))
    everything = torch.stack([images.read(index) for index in range(count)])
    network.eval()(normalize(to_unit(everything, torch.device("cpu"))))
    handle.remove()
    (tokens,) = seen

    recalibrate_stem(network, images, config, normalize=normalize, device=torch.device("cpu"))
    off = (norm.running_mean - tokens.mean(0)).abs() / tokens.std(0)
    assert off.max() < 0.1  # the first 128 images: 0.6
    assert (norm.running_var / tokens.var(0) - 1).abs().max() < 0.25
    assert not norm.training
