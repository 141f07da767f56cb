"""The `mpm` command: what it writes is what the networks say, and its help can be followed."""

import csv
import io
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close
from torch.utils.data import DataLoader

import mpm
from mpm import cli
from mpm.commands import prediction, words
from mpm.commands.outputs import appearing
from mpm.data.images import read_image
from mpm.run import _log_to, _stop_logging_to_files
from tests.command_line import CONFIGS, TINY, CommandLine

DEBUG = CONFIGS / "debug.yaml"
COMMANDS = [
    "pretrain",
    "finetune",
    "predict",
    "evaluate",
    "attention",
    "reconstruct",
    "features",
    "probe",
    "models",
    "import",
    "export",
    "config",
    "stats",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders with three photos each, of other sizes than the networks', and one that is none."""
    draw = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("photos")
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for number in range(3):
            pixels = draw.integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "bee" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    return root


def rows_of(text: str) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(text))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    example = re.search(r"example:\n  mpm (.*)\n", text)
    assert example
    monkeypatch.chdir(tmp_path)
    for run in ("flowers", "vitb_mae"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "config.yaml").touch()
    for folder in ("photos", "more"):
        (tmp_path / folder).mkdir()
    for name in ("photos/*.jpg", "more/rose.jpg"):
        (tmp_path / name).touch()
    assert words.parse(example[1].split()).command == command


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {command}\s", text, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(
    "line", ["a=1 --config F --dry-run b=2", "--config F a=1 --dry-run b=2", "--config F a=1 b=2"]
)
def test_overrides_may_stand_anywhere(line: str) -> None:
    assert words.parse(["pretrain", *line.split()]).words == ["a=1", "b=2"]


def test_lists_end_at_words_of_another_kind(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    a, b = tmp_path / "a", tmp_path / "b"
    line = f"evaluate {a} --image-sizes 160 224x192 k=v --crops 0.875 1 {b}"
    options = words.parse(line.split())
    assert (options.image_sizes, options.crops) == ([(160, 160), (224, 192)], [0.875, 1.0])
    assert sorted(map(str, options.words)) == sorted([str(a), str(b), "k=v"])
    with pytest.raises(SystemExit):
        words.parse(f"evaluate {a} --crops 1.5".split())


def test_config_shows_every_value_and_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(DEBUG), "optim.lr=3e-4"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^optim\.lr +0\.0003 +override$", text, re.MULTILINE)
    assert re.search(rf"^mask\.ratio +0\.75 +{re.escape(str(DEBUG))}:8$", text, re.MULTILINE)
    assert cli.main(["config", str(CONFIGS / "finetune" / "debug.yaml")]) == 0
    assert re.search(r"^readout\.kind +\"mean\" ", capsys.readouterr().out, re.MULTILINE)


def test_predictions_are_those_of_the_loaded_network(
    commands: CommandLine, finetuned: Path, photos: Path, tmp_path: Path
) -> None:
    single = photos / "ant" / "1.png"
    ended = commands("mpm", "predict", finetuned, single, photos, "-o", tmp_path / "out.csv")
    assert ended.status == 0, ended.err
    assert "torn.jpg" in ended.err
    assert "classes of 7 images; 1 could not be read" in ended.err
    rows = list(rows_of((tmp_path / "out.csv").read_text()))
    assert [row["image"] for row in rows][:2] == [str(single), str(photos / "ant" / "0.png")]
    network = mpm.load(finetuned)
    for row in rows:
        pixels = torch.from_numpy(np.array(Image.open(row["image"]))).permute(2, 0, 1)
        (expected,) = network.predict(network.preprocess([pixels]))
        written = torch.tensor([float(row[f"p({name})"]) for name in network.classes])
        assert_close(written, expected, atol=2e-6, rtol=0)  # six digits are written
        assert row["class"] == network.classes[expected.argmax()]
        assert float(row["probability"]) == written.max()
    assert list(tmp_path.iterdir()) == [tmp_path / "out.csv"]


def test_predictions_of_many_classes_are_the_five_best() -> None:
    names = [f"class {number}" for number in range(21)]
    probabilities = torch.arange(21.0).softmax(0)[None]
    header, (row,) = prediction._header(names), prediction._rows(probabilities, names)
    assert header == [
        "class",
        "probability",
        *(f"{c}_{n}" for n in range(2, 6) for c in ("class", "probability")),
    ]
    assert row[::2] == ["class 20", "class 19", "class 18", "class 17", "class 16"]
    assert_close(torch.tensor([float(p) for p in row[1::2]]), probabilities[0].flip(0)[:5], atol=1e-6, rtol=0)


def test_failed_prediction_leaves_the_file_that_was_there(
    commands: CommandLine, finetuned: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    out.write_text("mine")
    ended = commands("mpm", "predict", finetuned, photos / "bee" / "torn.jpg", "-o", out)
    assert ended.status == 2
    assert "none of the 1 images can be used: cannot read" in ended.complaint
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_paths_that_are_not_utf8_are_told_and_listed_with_their_bytes(
    commands: CommandLine, finetuned: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(photos / "ant", folder)
    out = tmp_path / "features.safetensors"
    ended = commands("mpm", "features", finetuned, tmp_path, "-o", out, "--labels")
    assert ended.status == 0, ended.err
    expected = [rf"caf\xe9/{number}.png" for number in range(3)]
    assert [row["image"] for row in rows_of(out.with_suffix(".csv").read_text())][:3] == expected
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == [r"caf\xe9"]
    for option in ((), ("-o", tmp_path / "out.csv")):
        ended = commands("mpm", "predict", finetuned, folder, *option)
        assert ended.status == 0, ended.err
        text = (tmp_path / "out.csv").read_text() if option else ended.out
        assert [row["image"] for row in rows_of(text)] == [f"{tmp_path}/{name}" for name in expected]
    shutil.copy(DEBUG, folder)
    ended = commands("mpm", "config", folder / "debug.yaml")
    assert ended.status == 0, ended.err
    assert rf"{tmp_path}/caf\udce9/debug.yaml:8" in ended.out


@pytest.mark.parametrize(
    "line", ["predict RUN .", "features . . -o RUN/a", "export . --to timm -o RUN", "import a -o RUN"]
)
def test_paths_that_safetensors_cannot_read_are_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stderr", told := io.StringIO())
    run = os.fsdecode(b"run\xe9")
    for folder in (".", run):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.yaml").touch()
    with pytest.raises(SystemExit) as ended:
        words.parse([word.replace("RUN", run) for word in line.split()])
    assert ended.value.code == 2
    assert re.search("the name run\udce9\\S* is not UTF-8; use another, or a link", told.getvalue())


def test_outputs_appear_together_or_not_at_all(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text("mine")
    with pytest.raises(OSError, match="full"), appearing(*files) as partials:  # noqa: PT012
        partials[0].write_text("half")
        raise OSError("the disk is full")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "mine", "b": "mine"}
    with appearing(*files) as partials:
        for partial in partials:
            partial.write_text("whole")
        partials[1].chmod(0o600)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "whole", "b": "whole"}
    assert files[0].stat().st_mode == files[1].stat().st_mode


def test_features_are_not_written_over_their_list(
    commands: CommandLine, pretrained: Path, photos: Path, tmp_path: Path
) -> None:
    ended = commands("mpm", "features", pretrained, photos, "-o", tmp_path / "out.csv")
    assert ended.status == 2
    assert "out.csv is where the image of each row is listed; give the features another" in ended.complaint
    assert list(tmp_path.iterdir()) == []


def test_evaluation_repeats_the_test_of_the_run(
    commands: CommandLine, finetuned: Path, tmp_path: Path
) -> None:
    recorded = json.loads((finetuned / "result.json").read_text())["test"]
    picture = tmp_path / "confusion.png"
    ended = commands("mpm", "evaluate", finetuned, "--json", "-o", picture)
    assert ended.status == 0, ended.err
    scores = json.loads(ended.out)
    assert {name: scores[name] for name in recorded} == recorded
    assert np.sum(scores["confusion"]) == recorded["count"] == 30
    assert sum(each["images"] for each in scores["classes"].values()) == 30
    with Image.open(picture) as image:
        assert min(image.size) > 100
    assert f"wrote {picture}: confusion matrix of 30 images" in ended.err


def test_evaluation_takes_other_images_and_prints_a_table(
    commands: CommandLine, finetuned: Path, photos: Path
) -> None:
    ended = commands("mpm", "evaluate", finetuned, "data.test.count=9", "run.workers=0")
    assert ended.status == 0, ended.err
    assert re.search(r"images +9\ntop-1 .*\ntop-5 .*\nbalanced accuracy .*\nmacro F1 ", ended.out)
    assert re.search(
        r"macro F1 .*\ncalibration error .*%\n(.*\n)*images/s .* \(float32, batch 32, ", ended.out
    )
    assert re.search(r"texture_3 +2 ", ended.out)
    ended = commands("mpm", "evaluate", finetuned, "data.test.kind=folder", f"data.test.root={photos}")
    assert ended.status == 2
    assert (
        "(ant, bee unknown to the network; texture_0, texture_1, texture_2 and 1 more without images)"
        in ended.complaint
    )


def test_reconstruction_keeps_what_is_visible(
    commands: CommandLine, pretrained: Path, photos: Path, tmp_path: Path
) -> None:
    sheets = []
    for seed, name in ((0, "a.png"), (0, "b.png"), (1, "c.png")):
        ended = commands("mpm", "reconstruct", pretrained, photos, "-o", tmp_path / name, "--seed", seed)
        assert ended.status == 0, ended.err
        sheets.append(np.asarray(Image.open(tmp_path / name)).astype(int))
    assert "6 images, 1 could not be read" in ended.err
    assert (sheets[0] == sheets[1]).all()
    assert (sheets[0] != sheets[2]).any()
    side, scale, patch = 100, 3, 4  # of a tile with its gap; of a pixel; of a patch in pixels
    assert sheets[0].shape == (3 * side, 6 * side, 3)
    column = sheets[0].reshape(3, side, 6, side, 3)[:, : 32 * scale, 2, : 32 * scale]
    original, masked, drawn = column[:, ::scale, ::scale].reshape(3, 8, patch, 8, patch, 3).swapaxes(2, 3)
    is_hidden = (masked == 128).all((2, 3, 4))  # [8,8]
    assert is_hidden.sum() == 48
    assert_close(drawn[~is_hidden], original[~is_hidden], atol=1, rtol=0)  # rounded twice to 8 bits
    assert (drawn[is_hidden] != original[is_hidden]).mean() > 0.5


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_features_are_those_of_the_loaded_network(
    kind: str, commands: CommandLine, photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    out = tmp_path / "features.safetensors"
    ended = commands("mpm", "features", run, photos, "-o", out, "--labels")
    assert ended.status == 0, ended.err
    assert "1 could not be read" in ended.err.replace("images ", "")
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {out.with_suffix(".csv").stat().st_mode}
    names = list(rows_of(out.with_suffix(".csv").read_text()))
    with safe_open(out, "pt") as file:
        features, labels = file.get_tensor("features"), file.get_tensor("labels")
        assert json.loads(file.metadata()["classes"]) == ["ant", "bee"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [row["class"] for row in names] == ["ant"] * 3 + ["bee"] * 3
    network = mpm.load(run)
    pixels = [read_image(photos / row["image"], channels=3) for row in names]
    assert_close(features, network.features(network.preprocess(pixels)))


def test_stats_agree_with_numpy_and_find_the_white_level(commands: CommandLine, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 3000, (3, 20, 20, 2), dtype=np.uint16)
    for number, image in enumerate(pixels):
        np.save(tmp_path / f"{number}.npy", image)
    (tmp_path / "torn.tif").write_bytes(b"II*\0")
    ended = commands("mpm", "stats", tmp_path)
    assert ended.status == 0, ended.err
    assert re.search(r"images +4, looked at 4, of them 1 broken\n", ended.out)
    assert re.search(
        rf"stored as +uint16, 2 channel\(s\); values {pixels.min()} to {pixels.max()}\n", ended.out
    )
    mean, std = (getattr(pixels / 4095, name)((0, 1, 2)) for name in ("mean", "std"))
    assert ended.out.endswith(
        f"data:\n  channels: 2\n  mean: [{mean[0]:.4f}, {mean[1]:.4f}]\n  std: [{std[0]:.4f}, {std[1]:.4f}]\n"
        "  max_value: 4095  # beside the root\n"
    )


def test_stats_reads_the_images_of_a_configuration(commands: CommandLine) -> None:
    ended = commands("mpm", "stats", CONFIGS / "finetune" / "debug.yaml", "data.train.count=12")
    assert ended.status == 0, ended.err
    assert "images   12, looked at 12, of them 0 broken" in ended.out


@pytest.mark.parametrize(
    ("program", "place"),
    [
        ("pretrain.py", "different"),
        pytest.param("finetune.py", "new", marks=pytest.mark.slow),
        pytest.param("pretrain.py", "new", marks=pytest.mark.slow),
        pytest.param("pretrain.py", "same", marks=pytest.mark.slow),
        pytest.param("finetune.py", "same", marks=pytest.mark.slow),
        pytest.param("finetune.py", "different", marks=pytest.mark.slow),
    ],
)
def test_dry_run_tells_the_facts_and_leaves_nothing_behind(
    program: str, place: str, commands: CommandLine, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind, config = (
        ("pretrained", DEBUG) if program == "pretrain.py" else ("finetuned", CONFIGS / "finetune/debug.yaml")
    )
    run = request.getfixturevalue(kind)
    folder = tmp_path / "deep" / "run" if place == "new" else run
    given = [f"run.output_dir={folder}", *(["seed=3"] if place == "different" else [])]
    given += ["monitor.images=0"] if kind == "pretrained" else ["data.test.count=30"]
    given += [f"init.checkpoint={request.getfixturevalue('pretrained')}"] if kind == "finetuned" else []
    before = contents(folder.parent)
    ended = commands(program, "--config", config, "--dry-run", *TINY, *given)
    assert contents(folder.parent) == before
    assert list(tmp_path.iterdir()) == []
    assert ended.err.count("what runs:") == 1
    if place == "different":
        assert ended.status == 2
        assert "already holds a different run (differs in seed)" in ended.complaint
    else:
        assert ended.status == 0, ended.err
        assert "dry run: two steps, a save and a load went well" in ended.out


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file below a folder, with the time of its last change."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_log_of_a_run_takes_what_is_no_utf8(tmp_path: Path) -> None:
    _log_to(tmp_path / "log.txt")
    logging.getLogger("mpm").warning("%s", os.fsdecode(b"caf\xe9"))
    _stop_logging_to_files()
    assert (tmp_path / "log.txt").read_text().endswith(r" caf\udce9" + "\n")


def test_loaders_that_have_no_core_are_not_told_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        DataLoader(range(4), num_workers=2)
        assert len(told) == 1
        monkeypatch.setattr(logging, "captureWarnings", lambda capture: None)
        cli._log_to_stderr()
        DataLoader(range(4), num_workers=2)
    assert len(told) == 1


def test_crash_of_ours_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(options: object) -> None:
        np.zeros(3).reshape(2)

    monkeypatch.setitem(cli.COMMANDS, "config", broken)
    with pytest.raises(ValueError, match="cannot reshape"):
        cli.main(["config", str(DEBUG)])


@pytest.mark.parametrize("word", ["optim.lr=fast", "--nonsense"])
def test_second_process_lets_the_first_say_what_is_wrong(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends all processes when one has ended, so the silent one has to outlive the other."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    told = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        try:
            status: object = cli.main(["--config", str(DEBUG), word], command="pretrain")
        except SystemExit as end:
            status = end.code
        assert status == 2
        told[rank] = bool(capsys.readouterr().err), bool(waited)
    assert told == {"0": (True, False), "1": (False, True)}
