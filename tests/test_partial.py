"""A checkpoint of partial tuning, laid over its base, is what was in memory; another base is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open

import mpm
from mpm import checkpoint, cli, partial
from mpm.checkpoint import load
from mpm.commands.exporting import subject_of
from mpm.configfile import ConfigError
from mpm.finetuning import finetune
from mpm.pretraining import pretrain
from mpm.trunk import read_trunk
from tests.integration.runs import assert_identical, everything_saved, metrics
from tests.integration.settings import HMLP, SCRATCH, finetune_config, pretrain_config

SHORT = ["optim.steps=2", "optim.warmup_steps=0", "data.test=null", "data.val=null", "data.train.count=64"]


def base(folder: Path, *words: str) -> Path:
    pretrain(pretrain_config(folder, "data.count=32", "optim.steps=1", "optim.warmup_steps=0", *words))
    return folder


def tuned(folder: Path, pretrained: Path, *words: str, stop_after: int | None = None) -> Path:
    words = (f"init.checkpoint={pretrained}", "tune=attention", *SHORT, *words)
    finetune(finetune_config(folder, *words), stop_after=stop_after)
    return folder


def stored(folder: Path) -> set[str]:
    path = checkpoint.latest(folder)
    assert path is not None
    with safe_open(path / "model.safetensors", "pt") as file:
        return set(file.keys())


def record(folder: Path) -> dict[str, Any]:
    return load(folder).metadata["base"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("pretrained") / "run")


@pytest.fixture(scope="module")
def run(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("tuned") / "run", pretrained)


@pytest.fixture
def moved(pretrained: Path, run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Base and run as copies whose recorded places are both wrong."""
    shutil.copytree(pretrained, tmp_path / "elsewhere" / "base")
    shutil.copytree(run, tmp_path / "run")
    manifest = checkpoint.latest(tmp_path / "run") / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["metadata"]["base"] |= {"path": "/gone/base", "relative": "../../gone"}
    manifest.write_text(json.dumps(facts))
    return tmp_path / "elsewhere" / "base", tmp_path / "run"


def test_it_holds_what_was_trained_and_nothing_else(run: Path) -> None:
    held = {name.removeprefix("classifier.") for name in stored(run)}
    # the norm of a mean readout starts afresh, so no base has it
    fresh = {"readout.norm.weight", "readout.norm.bias"}
    whole = {name.removeprefix("classifier.") for name in partial.load(run).model}
    trained = {name for name in whole if ".attn." in name or name.startswith("heads.")}
    assert held - fresh == trained | {"backbone.positions.table"}
    # the average is evaluated, and so is saved: it has the same holes
    assert load(run).ema.keys() == load(run).model.keys()


def test_laid_over_its_base_it_is_the_network_in_memory(run: Path, pretrained: Path) -> None:
    whole, theirs = partial.load(run), read_trunk(pretrained).weights
    for name, tensor in whole.model.items():
        if name in record(run)["names"]:
            assert tensor.equal(theirs[name.removeprefix("classifier.")])
    moved = {n for n in stored(run) if ".attn.proj.weight" in n}
    assert moved
    assert not any(whole.model[n].equal(theirs[n.removeprefix("classifier.")]) for n in moved)
    network = mpm.load(run)
    state = whole.ema if whole.metadata["weights"] == "ema" else whole.model
    assert_identical(
        dict(network.classifier.state_dict()),
        {name: state[f"classifier.{name}"] for name in network.classifier.state_dict()},
    )


STEMS = {
    "batch norm": [HMLP % "batch"],
    "shared bias": ["backbone.positions={table: none, bias: shared}"],
}


CASES = [
    pytest.param(stem, part, marks=[] if (stem, part) == ("batch norm", "attention") else pytest.mark.slow)
    for stem in STEMS
    for part in ("attention", "norm", "head")
]


@pytest.mark.parametrize(("stem", "part"), CASES)
def test_what_the_base_has_not_is_stored(stem: str, part: str, tmp_path: Path) -> None:
    """Resampled positions, statistics measured anew; and a resumed run is equal to the last bit."""
    theirs = base(tmp_path / "base", *STEMS[stem])
    words = [f"tune={part}", "data.image_size=[40,48]", "ema=null", "run.save_every=1"]
    straight = tuned(tmp_path / "straight", theirs, *words)
    resumed = tuned(tmp_path / "resumed", theirs, *words, stop_after=1)
    first = partial.load(resumed).model
    tuned(resumed, theirs, *words)
    assert metrics(resumed) == metrics(straight)
    left, right = everything_saved(resumed), everything_saved(straight)
    for saved in (left, right):
        saved["metadata"]["base"].pop("relative")
    assert_identical(left, right)
    last = partial.load(straight).model
    assert last.keys() == first.keys() >= load(straight).model.keys()
    frozen = record(straight)["names"]
    assert frozen
    assert all(last[name].equal(first[name]) for name in frozen)
    own = stored(straight)
    statistics = {name for name in last if "running_mean" in name}
    assert statistics <= own
    unchanged = {name for name in own if last[name].equal(first[name])}
    allowed = ("num_batches_tracked", "running_", "readout.norm", "relative_biases", "positions.table")
    assert not {name for name in unchanged if not any(word in name for word in allowed)}


@pytest.mark.slow
def test_storage_is_what_is_trained(pretrained: Path, tmp_path: Path) -> None:
    """The paper: two thirds less for each further network."""
    theirs = base(tmp_path / "base", "backbone={patch_size: 8, dim: 192, depth: 12, heads: 3}")
    sizes = {}
    for part in ("all", "attention"):
        folder = tuned(tmp_path / part, theirs, f"tune={part}", "ema=null")
        sizes[part] = (checkpoint.latest(folder) / "model.safetensors").stat().st_size
    trained = 12 * (4 * 192**2 + 4 * 192) + 16 * 192 + 4 * 193 + 2 * 192
    assert sizes["attention"] == pytest.approx(4 * trained, rel=0.01)
    assert 1 - sizes["attention"] / sizes["all"] == pytest.approx(0.66, abs=0.01)


def test_a_run_and_its_base_move_together(pretrained: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    for part in (pretrained.parent, run.parent):
        shutil.copytree(part, folder / part.name)
    manifest = checkpoint.latest(folder / run.parent.name / "run") / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["metadata"]["base"]["path"] = "/gone/base"
    manifest.write_text(json.dumps(facts))
    expected = partial.load(run).model
    assert_identical(partial.load(folder / run.parent.name / "run").model, expected)


def test_a_base_that_is_gone_is_told_and_can_be_named(moved: tuple[Path, Path]) -> None:
    theirs, folder = moved
    with pytest.raises(FileNotFoundError, match=r"on top of /gone/base.*checkpoints/base") as raised:
        mpm.load(folder)
    assert "\n" not in str(raised.value)
    (folder / "checkpoints" / "base").write_text(f"{theirs}\n")
    assert mpm.load(folder).step == 2


def test_another_base_is_refused(moved: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = moved
    other = base(tmp_path / "other", "seed=1")
    (folder / "checkpoints" / "base").write_text(str(other))
    with pytest.raises(ValueError, match=f"{other} is another network; put it back"):
        mpm.load(folder)


def test_a_part_is_a_base_in_turn_and_is_exported_whole(run: Path, tmp_path: Path) -> None:
    again = tuned(tmp_path / "again", run, "tune=head", "seed=5")
    assert not {name for name in stored(again) if ".attn." in name}
    whole, first = partial.load(again), partial.load(run)
    assert whole.model.keys() == first.model.keys()
    theirs = partial.better_weights(first)
    changed = {name for name, tensor in whole.model.items() if not tensor.equal(theirs[name])}
    assert changed == {"classifier.heads.0.weight", "classifier.heads.0.bias"}
    exported = subject_of(again).state
    chosen = partial.better_weights(whole)
    assert_identical(dict(exported), {n.removeprefix("classifier."): chosen[n] for n in chosen})


def test_weights_of_others_are_a_base(pretrained: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=4
    )
    file = tmp_path / "published.pth"
    torch.save(theirs.state_dict(), file)
    run = tuned(tmp_path / "run", file, "data.image_size=32", "readout.kind=token", "backbone=null")
    path = "classifier.backbone.blocks.0.mlp.fc2.weight"
    assert path not in stored(run)
    assert partial.load(run).model[path].equal(theirs.state_dict()["blocks.0.mlp.fc2.weight"])


@pytest.mark.slow
def test_a_fresh_readout_is_trained_and_the_whole_is_evaluated(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [
        "tune=head",
        "readout={kind: class_attention, depth: 1}",
        "data.test={kind: synthetic, count: 24}",
    ]
    folder = tuned(tmp_path, pretrained, *words)
    parts = {name.removeprefix("classifier.").partition(".")[0] for name in stored(folder)}
    assert parts == {"readout", "heads"}
    assert cli.main(["evaluate", str(folder), "--json", "run.device=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = json.loads((folder / "result.json").read_text())["test"]
    assert {name: found[name] for name in expected} == expected


def test_partial_tuning_needs_weights() -> None:
    with pytest.raises(ConfigError, match=r"tune attention freezes the rest.*give init.checkpoint"):
        finetune_config(Path("runs/x"), *SCRATCH, "tune=attention")
