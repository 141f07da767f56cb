"""Tokenizers are trained and BEiT learns their codes: whole runs, and what they refuse."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from mpm import build, checkpoint
from mpm.config import PretrainConfig, TokenizerConfig
from mpm.network import load
from mpm.pretraining import pretrain
from mpm.tokenization import read_tokenizer
from mpm.trunk import read_trunk
from tests.integration.runs import assert_identical, everything_saved, metrics
from tests.integration.settings import (
    CLASS_PRETRAINING,
    TOKENIZERS,
    codes_of,
    pretrain_config,
    tokenizer_config,
)

FEATURES = "objective={kind: kmeans, codes: 16, input: {kind: features, network: %s, layer: 1}}"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, words in TOKENIZERS.items():
        pretrain(tokenizer_config(folder / name, *words, "optim.steps=6"))
    return folder


def stopped_and_not(config: PretrainConfig | TokenizerConfig, folder: Path) -> tuple[Path, Path]:
    """Folders of the same run, stopped after 3 steps and continued, and in one go."""
    one_go = folder / "one_go"
    pretrain(config.model_copy(update={"run": config.run.model_copy(update={"output_dir": one_go})}))
    pretrain(config, stop_after=3)
    pretrain(config)
    return Path(config.run.output_dir), one_go


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kmeans", "dvae", "vqkd"])
def test_stopped_tokenizer_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """Codebook, its moving use and, of Gumbel noise, the generator included."""
    words = [*TOKENIZERS[name], "optim.steps=7", "run.micro_batch=16"]
    stopped, one_go = stopped_and_not(tokenizer_config(tmp_path / "stopped", *words), tmp_path)
    assert_identical(everything_saved(stopped), everything_saved(one_go))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beit", "beitv2", "hog", "latent"])
def test_stopped_objective_ends_as_an_uninterrupted_one(name: str, tokenizers: Path, tmp_path: Path) -> None:
    words = {
        "beit": codes_of(tokenizers / "dvae"),
        "beitv2": [*codes_of(tokenizers / "vqkd"), *CLASS_PRETRAINING],
        "hog": ["objective.predictor={kind: linear}", "objective.target={kind: hog}"],
        "latent": ["objective.target={kind: latent, prototypes: 16, momentum: 0.9}"],
    }[name]
    config = pretrain_config(tmp_path / "stopped", *words, "optim.steps=7")
    stopped, one_go = stopped_and_not(config, tmp_path)
    assert_identical(everything_saved(stopped), everything_saved(one_go))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_checkpoint_is_the_tokenizer_that_was_trained(name: str, tokenizers: Path) -> None:
    tokenizer = read_tokenizer(tokenizers / name)
    saved = checkpoint.load(tokenizers / name)
    own = {
        key.removeprefix("tokenizer."): t for key, t in saved.model.items() if key.startswith("tokenizer.")
    }
    assert_identical(dict(sorted(tokenizer.state_dict().items())), dict(sorted(own.items())))
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.encode(images)
    assert codes.shape == (5, 64)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < tokenizer.vocab_size
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), codes)


@pytest.mark.parametrize(
    "name", ["kmeans", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dvae", "vqkd"))]
)
def test_beit_starts_at_the_logarithm_of_the_number_of_codes_and_learns(
    name: str, tokenizers: Path, tmp_path: Path
) -> None:
    words = [*codes_of(tokenizers / name), "backbone.initialization=beit"]
    pretrain(pretrain_config(tmp_path, *words, "optim.steps=30", "optim.warmup_steps=3"))
    losses = [record["train/loss"] for record in metrics(tmp_path) if "train/loss" in record]
    vocab_size = read_tokenizer(tokenizers / name).vocab_size
    assert losses[0] == pytest.approx(math.log(vocab_size), abs=0.3)
    assert losses[-1] < losses[0] - 0.05
    assert all(
        0 <= record["train/code_accuracy"] <= 1 for record in metrics(tmp_path) if "train/loss" in record
    )


def test_class_pretraining_sums_two_cross_entropies_and_leaves_a_network(
    tokenizers: Path, tmp_path: Path
) -> None:
    words = [*codes_of(tokenizers / "kmeans"), *CLASS_PRETRAINING, "backbone.initialization=beit"]
    pretrain(pretrain_config(tmp_path, *words, "optim.steps=2", "optim.warmup_steps=0"))
    first = next(record["train/loss"] for record in metrics(tmp_path) if "train/loss" in record)
    assert first == pytest.approx(2 * math.log(32), abs=0.6)
    assert load(tmp_path).features(torch.rand(2, 3, 32, 32)).shape == (
        2,
        read_trunk(tmp_path).backbone.resolved().dim,
    )


@pytest.mark.slow
def test_codes_of_a_networks_features_keep_the_network(tmp_path: Path) -> None:
    pretrain(pretrain_config(tmp_path / "network", "optim.steps=6", "data.mean=[0.4, 0.5, 0.6]"))
    words = [FEATURES % (tmp_path / "network"), "optim.steps=4"]
    pretrain(tokenizer_config(tmp_path / "features", *words))
    tokenizer = read_tokenizer(tmp_path / "features")
    network = load(tmp_path / "network")
    images = torch.rand(3, 3, 32, 32)
    tokens = network.backbone.encode(network.backbone.embed(network.normalize(images)), layers=(0,)).layers[0]
    tokens = torch.nn.functional.layer_norm(tokens[:, 1:], tokens.shape[-1:])
    distances = torch.cdist(tokens.double(), tokenizer.codebook.vectors.double()[None])
    assert torch.equal(tokenizer.encode(images), distances.argmin(-1))
    (tmp_path / "network").rename(tmp_path / "moved")
    assert torch.equal(read_tokenizer(tmp_path / "features").encode(images), tokenizer.encode(images))


def test_number_of_codes_fits_the_data(tmp_path: Path) -> None:
    """Half the root of all patches, as a power of two."""
    assert build.default_codes(1_281_167, 196) == 8192
    pretrain(tokenizer_config(tmp_path, "objective.codes=null", "optim.steps=1"))
    assert read_tokenizer(tmp_path).vocab_size == 64  # 256 images of 64 patches


def test_other_tokenizer_in_the_same_folder_is_noticed(tmp_path: Path) -> None:
    pretrain(tokenizer_config(tmp_path / "tokenizer", "optim.steps=1"))
    run = pretrain_config(tmp_path / "run", *codes_of(tmp_path / "tokenizer"), "optim.steps=6")
    pretrain(run, stop_after=1)
    shutil.rmtree(tmp_path / "tokenizer")
    pretrain(tokenizer_config(tmp_path / "tokenizer", "optim.steps=1", "seed=1"))
    with pytest.raises(
        ValueError, match=r"^objective\.target\.tokenizer .* has other weights than when .* began: trained on"
    ):
        pretrain(run)


# Refusals


def test_missing_tokenizer_is_told_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tokenizer; train one: mpm pretrain --config"):
        pretrain(pretrain_config(tmp_path / "run", *codes_of(tmp_path / "nothing")))


def test_run_of_pretraining_is_no_tokenizer(tmp_path: Path) -> None:
    pretrain(pretrain_config(tmp_path / "network", "optim.steps=1", "optim.warmup_steps=0"))
    with pytest.raises(ValueError, match="is a run of kind pretrain, not a tokenizer"):
        pretrain(pretrain_config(tmp_path / "run", *codes_of(tmp_path / "network")))


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("kmeans", ["data.channels=1", "data.mean=[0.5]", "data.std=[0.5]"], r"trained on 3 channel\(s\)"),
        (
            "dvae",
            ["backbone.patch_size=[4, 8]"],
            "has codes for 4x4 pixels, and a patch of 4x8 has another shape",
        ),
        ("vqkd", ["data.image_size=48"], "gives 8x8 codes, but there are 12x12 patches"),
    ],
    ids=["channels", "stride", "grid"],
)
def test_tokenizer_that_does_not_fit_is_refused(
    name: str, words: list[str], told: str, tokenizers: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        pretrain(pretrain_config(tmp_path, *codes_of(tokenizers / name), *words))


def test_collapsed_codebook_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    words = [*TOKENIZERS["dvae"], "objective.codes=512", "optim.steps=1", "optim.warmup_steps=0"]
    pretrain(tokenizer_config(tmp_path / "collapsed", *words))
    beit = [*codes_of(tmp_path / "collapsed"), "optim.steps=1", "optim.warmup_steps=0"]
    with pytest.raises(ValueError, match=r"has collapsed: \d+ of 512 codes occur in 16,384 patches"):
        pretrain(pretrain_config(tmp_path / "run", *beit, "objective.target.min_live=0.9"))
    pretrain(pretrain_config(tmp_path / "run", *beit, "objective.target.min_live=0"))


@pytest.mark.parametrize("name", ["mpm.load", "finetune"])
def test_tokenizer_is_no_network(name: str, tokenizers: Path) -> None:
    with pytest.raises(ValueError, match="is a tokenizer, not a network"):
        {"mpm.load": load, "finetune": read_trunk}[name](tokenizers / "dvae")
