"""`mpm.load` gives the network that was trained, whatever lay in memory before."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mpm
from mpm import build, checkpoint
from mpm.finetuning import finetune
from mpm.patchify.pixels import Normalize
from mpm.pretraining import pretrain
from mpm.trunk import part_of
from tests.integration.settings import SCRATCH, finetune_config, pretrain_config

SHORT = ["optim.steps=1", "optim.warmup_steps=0"]
TRUNKS = {
    "vit": [],
    "shared bias": ["backbone.positions={table: none, bias: shared}"],
    "bias per block": ["backbone.positions={table: learned, bias: per_block}"],
    "cait": ["backbone.attention=talking_heads", "backbone.class_token=false"],
    "parallel": ["backbone.branches=2", "backbone.layer_scale=0.1"],
    "hmlp": ["backbone.stem={kind: hmlp}"],
    "conv": ["backbone.stem={kind: conv}"],
}


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """What torch hands out holds NaN, and indices that are out of every range."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("trunk", TRUNKS)
def test_loaded_backbone_is_the_trained_one(trunk: str, tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, *SHORT, "data.count=32", *TRUNKS[trunk])
    pretrain(config)
    objective = build.objective(config, 48).eval()
    objective.load_state_dict(checkpoint.load(tmp_path).model)
    network = mpm.load(tmp_path)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    moments = build.statistics(*(checkpoint.load(tmp_path).config["data"][key] for key in ("mean", "std")))
    encoded = objective.backbone(Normalize(*map(tuple, moments))(images / 255))
    expected = objective.get_submodule("predictor.norm")(encoded.patches).mean(1)
    torch.testing.assert_close(network.features(images), expected)


@pytest.mark.usefixtures("_poisoned_memory")
def test_loaded_classifier_predicts_as_its_test_did(tmp_path: Path) -> None:
    pretrain(pretrain_config(tmp_path / "a", *SHORT, "data.count=32", *TRUNKS["shared bias"]))
    words = [f"init.checkpoint={tmp_path / 'a'}", "readout.kind=token", "evaluate_every=1"]
    finetune(finetune_config(tmp_path / "b", *SHORT, *words))
    network = mpm.load(tmp_path / "b")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert network.predict(images).isfinite().all()
    assert torch.equal(network.predict(images), mpm.load(tmp_path / "b").predict(images))


@pytest.mark.slow
def test_a_probes_norm_is_folded_into_its_head_where_it_is_loaded(tmp_path: Path) -> None:
    config = finetune_config(tmp_path, *SCRATCH, "head_norm=batch", "ema=null", "optim.steps=6")
    finetune(config)
    assert config.backbone is not None
    own = build.classifier(config, config.backbone, image_size=(32, 32), channels=3, num_classes=4).eval()
    own.load_state_dict(part_of(checkpoint.load(tmp_path).model, "classifier"))
    assert own.head_norms[0].running_var.ne(1).all()
    loaded = mpm.load(tmp_path)
    images = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(
        loaded.predict(images), own.predict(loaded.normalize(images)).softmax(1), rtol=1e-4, atol=1e-5
    )
