"""`mpm tokenize` with a small k-means tokenizer on generated images."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpm import build
from mpm.commands.tokenizing import tokenize
from mpm.config import PretrainConfig, TokenizerConfig
from mpm.configfile import ConfigError, load
from mpm.data.codes import create_code_cache
from mpm.data.datasets import SyntheticImages
from mpm.data.images import UnreadableImage
from mpm.masked_pretraining import MaskedPretraining
from mpm.pretraining import pretrain
from mpm.tokenizers.kmeans import PatchCodes
from tests.integration.settings import CONFIGS, QUICK, pretrain_config

COUNT, CROPS, STEPS = 20, 2, 6
NUM_PATCHES = 64  # of the debug backbone, patches 4x4 of 32x32
WORDS = [
    f"data.count={COUNT}",
    "data.color_jitter=0.3",
    "optim.batch_size=8",
    f"optim.steps={STEPS}",  # three epochs
    "objective.predictor={kind: linear}",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of k-means on patches of another size than the network's, so that it has a view of its own."""
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    words = [
        *QUICK,
        f"run.output_dir={folder}",
        "data={kind: synthetic, count: 64, image_size: 48, interpolation: bilinear}",
        "objective={kind: kmeans, codes: 40, input: {kind: pixels, patch_size: 6}}",
        "optim={steps: 6, batch_size: 32, dtype: fp32}",
        "monitor.images=0",
        "run.workers=0",
    ]
    pretrain(load(CONFIGS / "tokenizers" / "kmeans_in1k.yaml", words, TokenizerConfig).config)
    return folder


def config_of(tokenizer: Path, folder: Path, *words: str) -> PretrainConfig:
    """With a cache in the folder."""
    target = f"objective.target={{kind: codes, tokenizer: {tokenizer}, min_live: 0, crops: {CROPS}}}"
    cache = f"objective.target.cache={folder / 'codes'}"
    return pretrain_config(folder / "run", *WORDS, target, cache, *words)


def inputs_of(config: PretrainConfig, *, cached: bool, workers: int = 0) -> list[Any]:
    """What the objective gets in all steps, after the numbers of the images."""
    if not cached:
        target = config.objective.target.model_copy(update={"cache": None})
        config = config.model_copy(
            update={"objective": config.objective.model_copy(update={"target": target})}
        )
    config = config.model_copy(update={"run": config.run.model_copy(update={"workers": workers})})
    experiment = MaskedPretraining(config)
    parts = experiment.create(torch.device("cpu"), is_new=True)
    assert (parts.codes is not None) == cached
    batches = build.training_loader(
        experiment.config,
        experiment.images,
        parts.view,
        start=0,
        stop=config.optim.steps,
        pin_memory=False,
        crops=parts.crops,
        cached=parts.codes,
    )
    return [(batch.index, *parts.prepare(batch)) for batch in batches]


def test_cached_codes_are_those_of_every_step(tokenizer: Path, tmp_path: Path) -> None:
    config = config_of(tokenizer, tmp_path)
    assert tokenize(config) == f"wrote {tmp_path / 'codes'}: the codes of 40 crops of 64 patches"
    computed = inputs_of(config, cached=False)
    assert len(computed) == STEPS
    for workers in (0, 2):
        torch.testing.assert_close(inputs_of(config, cached=True, workers=workers), computed, atol=0, rtol=0)


def test_batches_and_workers_do_not_change_codes(tokenizer: Path, tmp_path: Path) -> None:
    contents = []
    for name, words in {"one": [], "other": ["run.workers=2", "run.micro_batch=4"]}.items():
        (tmp_path / name).mkdir()
        tokenize(config_of(tokenizer, tmp_path / name, *words))
        contents.append((tmp_path / name / "codes").read_bytes())
    assert contents[0] == contents[1]


def test_signal_stops_and_the_same_command_continues(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tokenizer, tmp_path)
    (tmp_path / "whole").mkdir()
    tokenize(config_of(tokenizer, tmp_path / "whole"))
    encode, encoded = PatchCodes.encode, []

    def encode_and_note(self: PatchCodes, images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        if encoded[1:] == [8, 8]:  # after a look at the codes in use
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, images)

    monkeypatch.setattr(PatchCodes, "encode", encode_and_note)
    told = tokenize(config)
    assert told == "stopped on request, 16 of 40 are done; the same command continues"
    with pytest.raises(ValueError, match=r"incomplete, 16 of 40; mpm tokenize CONFIG continues"):
        MaskedPretraining(config).create(torch.device("cpu"), is_new=True)
    encoded.clear()
    tokenize(config)
    assert encoded[1:] == [4, 8, 8, 4]  # the rest of the first crop, then the second
    assert (tmp_path / "codes").read_bytes() == (tmp_path / "whole" / "codes").read_bytes()
    encoded.clear()
    assert tokenize(config).startswith("wrote")
    assert len(encoded) == 1  # there is nothing left to do


@pytest.mark.slow
def test_unreadable_images_have_no_codes_until_they_can_be_read(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["data.count=100", "optim.batch_size=100", "objective.target.crops=1"]
    words += ["optim.steps=2", "optim.warmup_steps=1"]
    config = config_of(tokenizer, tmp_path, *words)
    read, broken = SyntheticImages.read, {5}

    def read_some(self: SyntheticImages, index: int) -> torch.Tensor:
        if index in broken:
            raise UnreadableImage(f"cannot read {index}")
        return read(self, index)

    monkeypatch.setattr(SyntheticImages, "read", read_some)
    assert tokenize(config).endswith("; 1 could not be read and have none")
    cached, computed = (inputs_of(config, cached=cached) for cached in (True, False))
    torch.testing.assert_close(cached, computed, atol=0, rtol=0)
    broken.clear()
    with pytest.raises(ValueError, match="no codes for image 5"):
        inputs_of(config, cached=True)
    assert tokenize(config).endswith("the codes of 100 crops of 64 patches")
    assert len(inputs_of(config, cached=True)) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["seed=4"], "seed: 0 not 4"),
        (["data.flip=false"], "data.flip: True not False"),
        (["data.crop_scale=[0.5, 1]"], "data.crop_scale"),
        (["data.image_size=64"], "images"),
        (["objective.target.crops=3"], "crops: 2 not 3"),
        (["data.count=22"], "images"),
    ],
)
def test_another_experiment_does_not_get_these_codes(
    tokenizer: Path, tmp_path: Path, words: list[str], named: str
) -> None:
    config = config_of(tokenizer, tmp_path)
    cache = {"crops": CROPS, "images": COUNT, "num_patches": NUM_PATCHES, "vocab_size": 40}
    experiment = MaskedPretraining(config)
    # the file of the experiment, without the work
    fingerprint = fingerprint_of(config)
    with create_code_cache(tmp_path / "codes", fingerprint=fingerprint, **cache) as codes:
        for crop in range(CROPS):
            codes.write(crop, 0, np.zeros((COUNT, NUM_PATCHES), int))
    assert experiment.create(torch.device("cpu"), is_new=True).codes is not None
    other = config_of(tokenizer, tmp_path, *words)
    for attempt in (tokenize, lambda config: MaskedPretraining(config).create("cpu", is_new=True)):
        with pytest.raises(ValueError, match=r"give another objective\.target\.cache") as caught:
            attempt(other)
        assert named in str(caught.value)


def fingerprint_of(config: PretrainConfig) -> dict[str, Any]:
    from mpm.data.substitution import Substituting
    from mpm.masked_pretraining import code_fingerprint, code_target
    from mpm.tokenization import read_tokenizer

    data = config.data
    images = build.source(data, image_size=data.image_size, channels=data.channels, labelled=False)
    tokenizer = read_tokenizer(config.objective.target.tokenizer)
    target, _ = code_target(config, tokenizer, Substituting(images), device=torch.device("cpu"))
    return code_fingerprint(config, target, images)


def test_mistakes_are_told(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"objective\.target\.kind is pixels"):
        tokenize(pretrain_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"objective\.target\.cache is not given"):
        tokenize(config_of(tokenizer, tmp_path, "objective.target.cache=null"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun"):
        tokenize(config_of(tokenizer, tmp_path))


def test_pretraining_with_the_cache_is_pretraining_without(tokenizer: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("cached", "computed"):
        folder = tmp_path / name
        folder.mkdir()
        config = config_of(tokenizer, folder)
        if name == "cached":
            tokenize(config)
        else:
            config = config_of(tokenizer, folder, "objective.target.cache=null")
        pretrain(config)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    assert len(losses["cached"]) == STEPS
    assert losses["cached"] == losses["computed"]
