"""`mpm tokenize` with a small k-means tokenizer on generated images."""

import functools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpm import build
from mpm.commands.tokenizing import tokenize
from mpm.config import PretrainConfig
from mpm.configfile import ConfigError
from mpm.data.codes import create_code_cache
from mpm.data.datasets import SyntheticImages
from mpm.data.images import UnreadableImage
from mpm.masked_pretraining import MaskedPretraining
from mpm.pretraining import pretrain
from mpm.tokenizers.kmeans import PatchCodes
from tests.integration.inputs import codes_in, inputs_of
from tests.integration.settings import TOKENIZERS, pretrain_config, tokenizer_config

COUNT, CROPS, STEPS = 20, 2, 6
NUM_PATCHES = 64  # of the debug backbone, patches 4x4 of 32x32
WORDS = [
    f"data.count={COUNT}",
    "data.color_jitter=0.3",
    "optim.batch_size=8",
    f"optim.steps={STEPS}",  # three epochs
    "objective.predictor={kind: linear}",
]
UNCACHED = "objective.target.cache=null"


# of patches of another size than the network's, so that it has a view of its own
PATCHES = [
    "data={kind: synthetic, count: 64, image_size: 48, interpolation: bilinear}",
    "objective={kind: kmeans, codes: 40, input: {kind: pixels, patch_size: 6}}",
    "optim.steps=6",
]
# likewise; uncertain, so that it has most of its codes in use
SMALL_VIEW = [*TOKENIZERS["dvae"], "objective.layers=1", "objective.kl_weight={start: 1, end: 1}"]
WORDS_OF = {"kmeans": PATCHES, "dvae": SMALL_VIEW, "vqkd": TOKENIZERS["vqkd"]}
NETWORKS = [pytest.param(name, marks=pytest.mark.slow) for name in ("dvae", "vqkd")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a tokenizer by its kind, made once."""
    folder = tmp_path_factory.mktemp("tokenizers")

    @functools.cache
    def run_of(kind: str) -> Path:
        pretrain(tokenizer_config(folder / kind, *WORDS_OF[kind]))
        return folder / kind

    return run_of


@pytest.fixture
def tokenizer(trained: Callable[[str], Path]) -> Path:
    return trained("kmeans")


def config_of(tokenizer: Path, folder: Path, *words: str) -> PretrainConfig:
    """With a cache in the folder."""
    target = f"objective.target={{kind: codes, tokenizer: {tokenizer}, min_live: 0, crops: {CROPS}}}"
    cache = f"objective.target.cache={folder / 'codes'}"
    return pretrain_config(folder / "run", *WORDS, target, cache, *words)


def test_cached_codes_are_those_of_every_step(tokenizer: Path, tmp_path: Path) -> None:
    config = config_of(tokenizer, tmp_path)
    assert tokenize(config) == f"wrote {tmp_path / 'codes'}: the codes of 40 crops of 64 patches"
    computed = inputs_of(config_of(tokenizer, tmp_path, UNCACHED))
    assert len(computed.steps) == STEPS
    for workers in (0, 2):
        cached = inputs_of(config, workers=workers)
        assert "their codes read from" in cached.facts["crops"]
        torch.testing.assert_close(cached.steps, computed.steps, atol=0, rtol=0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_cached_codes_of_networks_are_those_of_every_step(
    kind: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """Computed in batches of as many images, and in bf16 too, which changes as many codes as is told."""
    codes = {}
    for dtype in ("fp32", "bf16"):
        words = ["data.count=24", f"objective.target.dtype={dtype}"]  # three whole batches of each crop
        (folder := tmp_path / dtype).mkdir()
        config = config_of(trained(kind), folder, *words)
        tokenize(config)
        cached, computed = inputs_of(config), inputs_of(config_of(trained(kind), folder, *words, UNCACHED))
        torch.testing.assert_close(cached.steps, computed.steps, atol=0, rtol=0)
        codes[dtype] = codes_in(cached)
    assert len(codes["fp32"].unique()) >= 8
    share = float((codes["bf16"] == codes["fp32"]).float().mean())
    told = re.search(r"bf16; ([0-9.]+)% of the codes in bf16 are those in fp32", cached.facts["tokenizer"])
    assert 0.9 < share < 1
    assert share == pytest.approx(float(told[1]) / 100, abs=0.02)  # told of whole images


@pytest.mark.parametrize("kind", ["kmeans", *NETWORKS])
def test_batches_and_workers_do_not_change_codes(
    kind: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    codes = []
    for name, words in {"one": [], "other": ["run.workers=2", "run.micro_batch=4"]}.items():
        (folder := tmp_path / name).mkdir()
        config = config_of(trained(kind), folder, *words)
        tokenize(config)
        codes.append(codes_in(inputs_of(config)))
    share = float((codes[0] == codes[1]).float().mean())
    # convolutions round by how many images they get, which decides between codes that tie
    assert share >= 0.999 if kind == "dvae" else share == 1


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
    computed = inputs_of(config_of(tokenizer, tmp_path, *words, UNCACHED))
    torch.testing.assert_close(inputs_of(config).steps, computed.steps, atol=0, rtol=0)
    broken.clear()
    with pytest.raises(ValueError, match="no codes for image 5"):
        inputs_of(config)
    assert tokenize(config).endswith("the codes of 100 crops of 64 patches")
    assert len(inputs_of(config).steps) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["seed=4"], "with seed 0, not 4"),
        (["data.flip=false"], "with data.flip true, not false"),
        (["data.crop_scale=[0.5, 1]"], "data.crop_scale"),
        (["data.image_size=64"], "before the images synthetic changed"),
        (["objective.target.crops=3"], "with crops 2, not 3"),
        (["data.count=22"], "before the images synthetic changed"),
        (["objective.target.dtype=bf16"], "with dtype"),
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
        with pytest.raises(ValueError, match="give another file") as caught:
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
    (tmp_path / "notes.txt").write_text("which tokenizer?")
    told = (
        r"notes\.txt is text, not weights, so it is no tokenizer; give a run of configs/tokenizers, or a file"
    )
    with pytest.raises(ValueError, match=told):
        tokenize(config_of(tmp_path / "notes.txt", tmp_path))
    with pytest.raises(ConfigError, match=r"objective\.target\.kind is pixels"):
        tokenize(pretrain_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"objective\.target\.cache is not given"):
        tokenize(config_of(tokenizer, tmp_path, UNCACHED))
    for cache in (tmp_path, tmp_path / "mistyped" / "codes"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"objective\.target\.cache .* folder"):
            tokenize(config_of(Path("nowhere"), tmp_path, f"objective.target.cache={cache}"))
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
            config = config_of(tokenizer, folder, UNCACHED)
        pretrain(config)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    assert len(losses["cached"]) == STEPS
    assert losses["cached"] == losses["computed"]
