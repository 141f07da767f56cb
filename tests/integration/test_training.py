"""What training is for: it learns, continues, transfers, and takes any image."""

import json
from pathlib import Path

import pytest
import torch

import mpm
from mpm.finetuning import finetune
from mpm.pretraining import pretrain
from tests.integration.runs import metrics
from tests.integration.settings import SCRATCH, SIMMIM, finetune_config, pretrain_config

# The image as it is: what is to be learnt by heart must not change.
SAME_VIEW = ["data.crop_scale=[1, 1]", "data.crop_ratio=[1, 1]", "data.flip=false"]
# Of zero, the mean of every normalised patch: its 48 pixels are divided by their unbiased deviation.
TRIVIAL_LOSS = 47 / 48


def losses(folder: Path) -> list[float]:
    return [record["train/loss"] for record in metrics(folder) if "train/loss" in record]


@pytest.mark.slow
def test_mae_learns_eight_images_by_heart(tmp_path: Path) -> None:
    size = ["data.count=8", "optim.batch_size=8", "optim.steps=400", "optim.lr=3e-3"]
    pretrain(pretrain_config(tmp_path, *SAME_VIEW, *size))
    assert sum(losses(tmp_path)[-10:]) / 10 < 0.25 * TRIVIAL_LOSS


@pytest.mark.slow
def test_a_classifier_learns_32_images_by_heart(tmp_path: Path) -> None:
    data = [
        "data.train.count=32",
        "data.val=null",
        "data.test={kind: synthetic, count: 32}",
        "data.test_crop=1",
    ]
    words = ["mixup=null", "ema=null", "optim.steps=40", "optim.lr=3e-3", "optim.layer_decay=1"]
    finetune(finetune_config(tmp_path, *SCRATCH, *SAME_VIEW, *data, *words))
    test = json.loads((tmp_path / "result.json").read_text())["test"]
    assert test["top1"] == 1
    assert test["count"] == 32


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(pretrain_config(folder, "optim.steps=40", "optim.lr=3e-3"))
    return folder


def test_pretraining_continues_where_earlier_weights_were(pretrained: Path, tmp_path: Path) -> None:
    pretrain(pretrain_config(tmp_path, f"init.checkpoint={pretrained}", "seed=1", "optim.steps=6"))
    first, last = losses(pretrained)[0], losses(pretrained)[-1]
    assert losses(tmp_path)[0] < last + 0.1 * (first - last)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["data.image_size=48"], id="larger"),
        pytest.param(["data.image_size=[20, 36]"], id="neither square"),
        pytest.param(["data.channels=1", "data.mean=measured", "data.std=measured"], id="grey"),
        pytest.param(
            ["data.image_size=24", "data.channels=5", "data.mean=measured", "data.std=measured"],
            id="smaller, five channels",
        ),
    ],
)
def test_other_images_are_fine_tuned_on(words: list[str], pretrained: Path, tmp_path: Path) -> None:
    steps = ["optim.steps=2", "optim.warmup_steps=0", "evaluate_every=2"]
    config = finetune_config(tmp_path, f"init.checkpoint={pretrained}", *words, *steps)
    finetune(config)
    network = mpm.load(tmp_path)
    images = torch.randint(256, (2, network.channels, *network.image_size), dtype=torch.uint8)
    assert network.image_size == config.data.image_size
    assert network.channels == (config.data.channels or 3)
    torch.testing.assert_close(network.predict(images).sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("method", "stem"),
    [
        ("mae", "hmlp"),
        pytest.param("simmim", "conv", marks=pytest.mark.slow),
        pytest.param("mae", "conv", marks=pytest.mark.slow),
        pytest.param("simmim", "hmlp", marks=pytest.mark.slow),
    ],
)
def test_another_stem_is_one_word(method: str, stem: str, tmp_path: Path) -> None:
    words = SIMMIM if method == "simmim" else []
    pretrain(pretrain_config(tmp_path, *words, "optim.steps=12", f"backbone.stem.kind={stem}"))
    assert losses(tmp_path)[-1] < 0.95 * losses(tmp_path)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ["data.image_size=28", "data.channels=1", "data.mean=[0.5]", "data.std=[0.2]"], id="grey 28x28"
        ),
        pytest.param(["data.channels=5", "data.mean=measured", "data.std=measured"], id="five channels"),
        pytest.param(["data.image_size=[24, 40]", "backbone.patch_size=[4, 8]"], id="neither square"),
    ],
)
def test_any_images_are_pretrained_on(words: list[str], tmp_path: Path) -> None:
    pretrain(pretrain_config(tmp_path, "optim.steps=6", "data.count=64", "monitor.images=2", *words))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert (tmp_path / "reconstructions.png").exists()


def test_each_run_of_a_process_has_its_own_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mpm")
    for name in ("first", "second"):
        pretrain(pretrain_config(tmp_path / name, "optim.steps=1", "optim.warmup_steps=0"))
    log = (tmp_path / "first" / "log.txt").read_text()
    assert "saved" in log
    assert "second" not in log
