"""What users get wrong, on the real command line: one line says what to do, and nothing saved is lost."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpm import checkpoint
from tests.command_line import CONFIGS, ROOT, TINY, CommandLine, Ended
from tests.integration.runs import assert_identical, everything_saved

DEBUG, FINETUNE = CONFIGS / "debug.yaml", CONFIGS / "finetune" / "debug.yaml"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folder_of_images(root: Path, *, whole: int, torn: int) -> Path:
    """Small PNGs, and files that are cut off."""
    root.mkdir()
    draw = np.random.default_rng(0)
    for number in range(whole + torn):
        file = root / f"{number:03}.png"
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
        if number >= whole:
            os.truncate(file, 100)
    return root


def pretrain_on(commands: CommandLine, images: Path, folder: Path, *words: object) -> Ended:
    data = f"data={{kind: folder, root: {images}, image_size: 32}}"
    monitor = "monitor={images: 2}"
    return commands(
        "pretrain.py", "--config", DEBUG, *TINY, data, monitor, f"run.output_dir={folder}", *words
    )


# Found before torch is imported


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["optim.larning_rate=1e-3"],
            r"unknown key optim\.larning_rate in override .*; did you mean optim\.lr\?",
        ),
        (["optim.batch_size=many"], r'optim\.batch_size is "many", expected a whole number'),
        (["data.image_size=30"], r"image_size 30 is not a multiple of patch_size 4; use 28 or 32"),
        (["mask.ratio=1"], r"mask\.ratio 1 hides all of 64 patches; use more than 0 and at most 0\.984"),
        (["mask.count=0"], r"mask\.count 0 hides nothing of 64 patches; use 1 to 63"),
        (["--dry-runn"], r"--dry-runn means nothing here; see mpm pretrain --help"),
    ],
)
def test_mistake_in_words_or_configuration_is_told_before_torch_is_imported(
    words: list[str], told: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    given = ["--config", str(DEBUG), f"run.output_dir={folder}", *words]
    python = [sys.executable, "-X", "importtime", ROOT / "pretrain.py", *given]
    ended = subprocess.run(
        python, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    imports, lines = [], []
    for line in ended.stderr.splitlines():
        (imports if line.startswith("import time:") else lines).append(line)
    assert ended.returncode == 2
    assert len(lines) == 1
    assert re.match(f"mpm: .*({told})$", lines[0]), lines[0]
    assert any(line.endswith(" pydantic") for line in imports)
    assert not any(line.endswith(" torch") for line in imports)
    assert not folder.exists()


# Data


def test_missing_and_empty_folder_are_named(commands: CommandLine, tmp_path: Path) -> None:
    ended = pretrain_on(commands, tmp_path / "photoz", tmp_path / "run")
    assert (ended.status, tmp_path / "run" in tmp_path.iterdir()) == (2, False)
    assert f"data.root: image folder {tmp_path / 'photoz'} does not exist" in ended.complaint
    (tmp_path / "photos").mkdir()
    ended = pretrain_on(commands, tmp_path / "photos", tmp_path / "run")
    assert ended.status == 2
    assert f"{tmp_path / 'photos'} holds no images; expected files ending in .jpg" in ended.complaint
    # the same command goes on once it is put right
    shutil.copytree(
        folder_of_images(tmp_path / "found", whole=16, torn=0), tmp_path / "photos", dirs_exist_ok=True
    )
    ended = pretrain_on(commands, tmp_path / "photos", tmp_path / "run")
    assert ended.status == 0, ended.err


@pytest.mark.slow
def test_few_undecodable_images_are_replaced_counted_and_logged(
    commands: CommandLine, tmp_path: Path
) -> None:
    images = folder_of_images(tmp_path / "images", whole=119, torn=1)
    ended = pretrain_on(commands, images, tmp_path / "run", "optim.steps=8")  # one epoch is seven steps
    assert ended.status == 0, ended.err
    told = re.findall(
        r"^cannot read .*/119\.png: .*; the next readable image takes its place \(1 of 120\)$",
        ended.err,
        re.M,
    )
    assert len(told) == 1
    assert told[0] in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "reconstructions.png").exists()


@pytest.mark.slow
def test_run_is_not_continued_on_other_images(commands: CommandLine, tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", whole=40, torn=0)
    assert pretrain_on(commands, images, tmp_path / "run", "monitor.images=0").status == 0
    next(images.rglob("*.png")).unlink()
    ended = pretrain_on(commands, images, tmp_path / "run", "monitor.images=0")
    assert ended.status == 2
    assert "the training data has other images than when" in ended.complaint
    assert "39, not 40; restore what was, or choose another run.output_dir" in ended.complaint


@pytest.mark.slow
def test_more_than_one_percent_undecodable_is_an_error(commands: CommandLine, tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", whole=58, torn=2)
    ended = pretrain_on(commands, images, tmp_path / "run", "monitor.images=0")
    assert ended.status == 2
    assert re.search(
        r"\d of 60 images cannot be read, which is more than 1 %; repair or remove them: .*/05[89]\.png",
        ended.complaint,
    )


@pytest.mark.slow
def test_image_that_is_not_finite_is_as_good_as_none(commands: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).random((32, 32, 3), dtype=np.float32)
        pixels[0, 0, 0] = np.inf if number == 7 else 0
        np.save(tmp_path / "images" / f"{number}.npy", pixels)
    ended = pretrain_on(commands, tmp_path / "images", tmp_path / "run", "monitor.images=0")
    assert ended.status == 2
    assert "1 of 20 images cannot be read" in ended.complaint
    assert "7.npy: it holds values that are not finite" in ended.complaint


# Checkpoints


def test_missing_checkpoint_is_named(commands: CommandLine, tmp_path: Path) -> None:
    folder = f"run.output_dir={tmp_path / 'run'}"
    ended = commands("finetune.py", "--config", FINETUNE, folder, "init.checkpoint=runs/nowhere")
    assert ended.status == 2
    assert "init.checkpoint: no checkpoint runs/nowhere; give a run's folder, a file of" in ended.complaint


@pytest.mark.parametrize(
    ("program", "words"),
    [("finetune.py", ["backbone.dim=64"]), ("pretrain.py", ["backbone.dim=64", "backbone.heads=2"])],
)
def test_checkpoint_of_another_architecture_is_refused(
    program: str, words: list[str], commands: CommandLine, pretrained: Path, tmp_path: Path
) -> None:
    config = DEBUG if program == "pretrain.py" else FINETUNE
    given = [*TINY, f"init.checkpoint={pretrained}", f"run.output_dir={tmp_path / 'run'}", *words]
    ended = commands(program, "--config", config, *given)
    assert ended.status == 2
    assert ended.complaint == (
        "mpm: backbone.dim 64 is not the checkpoint's, 32; leave it out, or choose another init.checkpoint"
    )
    assert list(tmp_path.iterdir()) == []


def test_other_channels_than_the_checkpoints_need_their_statistics(
    commands: CommandLine, pretrained: Path, tmp_path: Path
) -> None:
    given = [*TINY, f"init.checkpoint={pretrained}", f"run.output_dir={tmp_path / 'run'}"]
    ended = commands("finetune.py", "--config", FINETUNE, *given, "data.channels=1")
    assert ended.status == 2
    assert "data.channels 1 is not the checkpoint's 3; give data.mean and data.std too" in ended.complaint
    ended = commands("finetune.py", "--config", FINETUNE, *given, "data.mean=[0.5]")
    assert ended.status == 2
    assert "mean has 1 numbers for 3 channels; give 3" in ended.complaint


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("train_state.pt", "manifest.json")),
    ],
)
def test_truncated_checkpoint_is_refused_by_name_and_passed_over_in_a_run(
    name: str, commands: CommandLine, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    newest = run / "checkpoints" / "step_00000004"
    os.truncate(newest / name, (newest / name).stat().st_size - 1)
    if name != "train_state.pt":  # which fine-tuning does not read
        ended = commands(
            "finetune.py",
            "--config",
            FINETUNE,
            *TINY,
            f"init.checkpoint={newest}",
            f"run.output_dir={tmp_path / 'f'}",
        )
        assert ended.status == 2
        assert str(newest) in ended.complaint
        assert ended.complaint.endswith("; use another checkpoint")
    ended = commands("pretrain.py", "--config", DEBUG, *TINY, "monitor.images=0", f"run.output_dir={run}")
    assert ended.status == 0, ended.err
    assert "passing over a broken checkpoint" in ended.err
    assert f"continuing {run} from step 2" in ended.err
    assert_identical(everything_saved(run), everything_saved(pretrained))


@pytest.mark.slow
def test_full_disk_while_saving_keeps_what_was_saved_and_the_run_goes_on(
    commands: CommandLine, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")  # as if it had been stopped after step 2
    before = contents(run / "checkpoints")
    given = ["--config", DEBUG, *TINY, "monitor.images=0", f"run.output_dir={run}"]
    ended = commands("pretrain.py", *given, limit=100_000)
    assert ended.status == 1
    assert re.search(
        r"could not save step 4 to .*: File too large.*; free space and start again with run\.resume=auto, "
        r"the last good checkpoint is step 2$",
        ended.complaint,
    )
    assert contents(run / "checkpoints") == before
    ended = commands("pretrain.py", *given)
    assert ended.status == 0, ended.err
    assert_identical(everything_saved(run), everything_saved(pretrained))


def test_full_disk_at_the_start_leaves_the_run_readable(
    commands: CommandLine, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    before = contents(run)
    given = ["--config", DEBUG, *TINY, "monitor.images=0", f"run.output_dir={run}"]
    ended = commands("pretrain.py", *given, limit=100)
    assert ended.status == 1
    assert "File too large; free space and start again" in ended.complaint
    after = contents(run)
    assert {path: after[path] for path in before if path.name != "log.txt"} == {
        path: data for path, data in before.items() if path.name != "log.txt"
    }


def test_folder_of_a_different_run_is_refused_and_left_alone(
    commands: CommandLine, pretrained: Path, tmp_path: Path
) -> None:
    before = contents(pretrained)
    given = ["--config", DEBUG, *TINY, "monitor.images=0", f"run.output_dir={pretrained}"]
    ended = commands("pretrain.py", *given, "optim.lr=2e-3", "seed=7")
    assert ended.status == 2
    assert ended.complaint == (
        f"mpm: {pretrained} already holds a different run (differs in seed, optim.lr); "
        "choose another run.output_dir, or remove that folder"
    )
    ended = commands("pretrain.py", *given, "run.resume=never")
    assert ended.status == 2
    assert "already holds a run and run.resume is never; choose another" in ended.complaint
    given = ["--config", FINETUNE, *TINY, f"init.checkpoint={pretrained}", f"run.output_dir={pretrained}"]
    ended = commands("finetune.py", *given)
    assert ended.status == 2
    assert "already holds another kind of run" in ended.complaint
    assert contents(pretrained) == before


@pytest.mark.slow
def test_run_that_saved_nothing_may_be_replaced(commands: CommandLine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torn = folder_of_images(tmp_path / "torn", whole=1, torn=15)
    assert pretrain_on(commands, torn, run, "monitor.images=0").status == 2
    images = folder_of_images(tmp_path / "images", whole=16, torn=0)
    ended = pretrain_on(commands, images, run, "monitor.images=0")
    assert ended.status == 0, ended.err


def test_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoints(
    commands: CommandLine, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rate = ["optim.lr=1e30", "optim.warmup_steps=3", "optim.steps=9", "run.log_every=5", "run.save_every=1"]
    ended = commands(
        "pretrain.py", "--config", DEBUG, *TINY, *rate, "monitor.images=0", f"run.output_dir={run}"
    )
    assert ended.status == 1
    told = (
        r"the loss or its gradient is not finite in steps (\d) to (\d) on rank 0, lr \S+; .*smaller optim\.lr"
    )
    match = re.search(told, ended.complaint)
    assert match
    saved = checkpoint.latest(run)
    assert saved is not None
    assert checkpoint.load(saved).step == int(match[2]) - 1
    checkpoint.load_train_state(saved)


# Several processes


def torchrun(*words: object) -> Ended:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*launcher, "pretrain.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=180
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def complaints(ended: Ended) -> list[str]:
    assert 'Traceback (most recent call last):\n  File "/work' not in ended.err
    return [line for line in ended.err.splitlines() if line.startswith("mpm: ")]


@pytest.mark.torchrun
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optim.lr=fast"], "expected a number"),
        (["data={kind: folder, root: /nowhere, image_size: 32}"], "does not exist"),
        (["optim.lr=1e30", "run.save_every=1000"], "not finite"),
    ],
    ids=["configuration", "data", "loss"],
)
def test_of_several_processes_one_complains(words: list[str], told: str, tmp_path: Path) -> None:
    ended = torchrun("--config", DEBUG, f"run.output_dir={tmp_path / 'run'}", *words)
    assert ended.status != 0
    (complaint,) = complaints(ended)
    assert told in complaint


@pytest.mark.torchrun
def test_mistake_that_only_the_second_process_sees_is_told(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", whole=31, torn=1)
    seed = 1
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(32)  # of the first epoch
    assert 31 in order[16:]
    data = f"data={{kind: folder, root: {images}, image_size: 32}}"
    folder = f"run.output_dir={tmp_path / 'run'}"
    ended = torchrun(
        "--config", DEBUG, *TINY, data, folder, "monitor={images: 0}", "optim.batch_size=32", f"seed={seed}"
    )
    assert ended.status != 0
    (complaint,) = complaints(ended)
    assert "1 of 32 images cannot be read" in complaint
