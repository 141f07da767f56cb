"""`mpm evaluate` and `mpm attention` on checkpoints with random weights, against loops over the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mpm
from mpm import build, checkpoint, cli
from mpm.commands.scores import Scores, Speed, as_table
from mpm.data.views import EvalView
from mpm.evaluation.accuracy import summarize
from mpm.evaluation.predictions import Predictions
from mpm.inheritance import inherit
from mpm.patchify.positions import resample_table
from tests.integration.settings import SCRATCH, finetune_config

CLASSES = 12  # from 11 on the order of numbers as text is another
ON_CPU = ["run.device=cpu", "run.workers=0"]


def written(folder: Path, names: tuple[str, ...], *words: str) -> Path:
    """A checkpoint of fine-tuning at 16x16 that was never trained."""
    config = inherit(finetune_config(folder, *SCRATCH, "data.image_size=16", "ema=null", *words), None)
    assert config.backbone is not None
    torch.manual_seed(len(words))
    network = build.classifier(
        config, config.backbone, image_size=(16, 16), channels=3, num_classes=len(names)
    )
    for head in network.heads:
        torch.nn.init.normal_(head.weight)  # so that images differ in their class
    model = {f"classifier.{name}": tensor for name, tensor in network.state_dict().items()}
    metadata = {"kind": "finetune", "classes": list(names), "weights": "model"}
    checkpoint.write(folder, config=config.model_dump(mode="json"), metadata=metadata, model=model)
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = tuple(f"n{number:08}" for number in range(CLASSES))
    return written(tmp_path_factory.mktemp("networks") / "a", names)


def images_in(root: Path, folder_of, count: int) -> Path:
    """Random images; `folder_of` tells where the i-th lies, relative to the root."""
    draw = np.random.default_rng(0)
    for number in range(count):
        colour = draw.integers(0, 256, 3)  # what most of the differences between images come from
        pixels = (0.7 * colour + 0.3 * draw.integers(0, 256, (20, 24, 3))).astype(np.uint8)
        image = Image.fromarray(pixels)
        file = root / folder_of(number, image)
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return root


def said_of(network: mpm.Network, file: Path | Image.Image, view: EvalView | None = None) -> torch.Tensor:
    """Probabilities [L]."""
    image = file if isinstance(file, Image.Image) else Image.open(file)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return network.predict((view or network.view)(pixels)[None])[0]


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert cli.main(["evaluate", *map(str, words), *ON_CPU, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def in_folder(root: Path) -> list[str]:
    return ["data.test.kind=folder", f"data.test.root={root}"]


@pytest.mark.slow
def test_folders_that_are_numbers_are_classes_by_number(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """ImageNet-V2's layout; half the images lie where the network says, so that the order matters."""
    loaded = mpm.load(network)

    def folder_of(number: int, image: Image.Image) -> str:
        said = int(said_of(loaded, image).argmax())
        return f"{number % CLASSES if number < CLASSES else said}/{number}.png"

    root = images_in(tmp_path / "v2", folder_of, 110)
    (root / "3" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    found = evaluated(capsys, network, *in_folder(root), "--mistakes", tmp_path / "mistakes.png")
    right = [int(said_of(loaded, file).argmax()) == int(file.parent.name) for file in root.rglob("*.png")]
    assert (found["count"], found["left_out"]) == (len(right), 1) == (110, 1)
    assert found["top1"] == np.mean(right) > 0.5
    assert list(found["classes"]) == list(loaded.classes)
    assert "the folders are the numbers 0 to 11" in found["classes_matched"]
    assert found["classes_matched"] in caplog.text
    with Image.open(tmp_path / "mistakes.png") as picture:
        assert picture.width > 400
    assert f"wrote {tmp_path / 'mistakes.png'}: the surest of {right.count(False)} mistakes" in caplog.text
    listed = {}
    for file in root.rglob("*.png"):
        said = said_of(loaded, file)
        if int(said.argmax()) != int(file.parent.name):
            true, predicted = loaded.classes[int(file.parent.name)], loaded.classes[int(said.argmax())]
            listed[str(file.relative_to(root))] = (
                true,
                predicted,
                pytest.approx(float(said.max()), rel=1e-4),
            )
    told = found["mistakes"]
    assert {each["image"]: (each["true"], each["predicted"], each["confidence"]) for each in told} == listed
    assert [each["confidence"] for each in told] == sorted((e["confidence"] for e in told), reverse=True)


def test_real_labels_skip_images_without_any(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = mpm.load(network)

    def folder_of(number: int, _: Image.Image) -> str:
        return f"n{number * 7 % CLASSES:08}/ILSVRC2012_val_{number + 1:08}.png"

    root = images_in(tmp_path / "val", folder_of, 30)
    said = [int(said_of(loaded, root / folder_of(number, None)).argmax()) for number in range(30)]
    labels = [[], *([said[n], 3] if n % 2 else [(said[n] + 1) % CLASSES] for n in range(1, 30))]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    found = evaluated(capsys, network, *in_folder(root), "--real", tmp_path / "real.json")
    hits = [said[number] in fitting for number, fitting in enumerate(labels) if fitting]
    assert (found["real_top1"], found["real_count"], found["count"]) == (np.mean(hits), 29, 30)
    assert 0.4 < found["real_top1"] < 0.6
    assert found["top1"] == np.mean([said[n] == n * 7 % CLASSES for n in range(30)])


@pytest.mark.slow
def test_networks_stand_side_by_side_at_every_size_and_crop(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = mpm.load(network).classes
    other = written(tmp_path / "b", names, "backbone.positions={table: learned, bias: per_block}")
    root = images_in(tmp_path / "photos", lambda n, _: f"{names[n % CLASSES]}/{n}.png", 24)
    words = [network, other, *in_folder(root), "--image-sizes", "16", "24x16", "--crops", "0.5", "1"]
    rows = evaluated(capsys, *words)["rows"]
    expected = [
        [str(path), size, crop]
        for path in (network, other)
        for size in ([16, 16], [24, 16])
        for crop in (0.5, 1)
    ]
    assert [[row["checkpoint"], row["image_size"], row["crop"]] for row in rows] == expected
    assert len({row["calibration_error"] for row in rows}) == 8  # each is another measurement
    for row in rows:
        size = tuple(row["image_size"])
        loaded = mpm.load(row["checkpoint"], image_size=size)
        view = EvalView(size, crop=row["crop"])
        right = [
            loaded.classes[int(said_of(loaded, file, view).argmax())] == file.parent.name
            for file in root.rglob("*.png")
        ]
        assert row["top1"] == np.mean(right)
        assert row["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
        assert (row["count"], row["left_out"], row["batch"], row["device"]) == (24, 0, 32, "cpu")
        assert row["images_per_s"] > 0

    assert cli.main(["evaluate", *map(str, [*words, *ON_CPU])]) == 0
    header, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.split()[:5] == ["checkpoint", "size", "crop", "images", "top-1"]
    starred = {line.split()[4] for line in lines if line.split()[4].endswith("*")}
    assert starred == {f"{max(row['top1'] for row in rows):.2%}*"}
    assert [line.split()[1:4] for line in lines[:3]] == [
        ["16", "0.5", "24"],
        ["16", "1", "24"],
        ["24x16", "0.5", "24"],
    ]


def scores_of(right: int, of: int, rate: float, *, checkpoint: str = "a", left_out: int = 0) -> Scores:
    """The first `right` of the images, all of class 0, are right, all with a confidence of 0.75."""
    chosen = (torch.arange(of) >= right).long()[:, None]
    truth = torch.zeros(of, dtype=torch.int64)
    predictions = Predictions(torch.arange(of), truth, chosen, torch.full((of,), 0.75))
    return Scores(
        checkpoint=checkpoint,
        image_size=(16, 16),
        crop=1.0,
        accuracy=summarize(predictions, num_classes=2),
        real=None,
        classes=("x", "y"),
        matched="",
        left_out=left_out,
        parameters=1234,
        speed=Speed(rate, 32, "cpu", 1),
    )


def test_a_star_is_at_the_best_of_each_column() -> None:
    """The calibration error is best where it is least; where all are the same, no one is best."""
    rows = [scores_of(8, 8, 100), scores_of(7, 8, 200, checkpoint="b"), scores_of(6, 8, 300.4, left_out=2)]
    cells = [line.split() for line in as_table(rows).splitlines()[1:4]]
    assert [row[0] for row in cells] == ["a", "b", "a"]
    assert [row[4] for row in cells][:2] == ["100.00%*", "87.50%"]
    assert "8 (2 unreadable)" in as_table(rows).splitlines()[3]
    assert [row[-1] for row in cells] == ["100", "200", "300*"]
    assert [row[-3] for row in cells] == ["25.00%", "12.50%", "0.00%*"]
    assert "*" not in as_table([rows[0], rows[0]]).splitlines()[1]


@pytest.mark.torchrun
def test_two_processes_give_the_scores_of_one(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = mpm.load(network).classes
    root = images_in(tmp_path / "photos", lambda n, _: f"{names[n % CLASSES]}/{n}.png", 25)
    words = [str(word) for word in (network, *in_folder(root))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "mpm", "evaluate", *words, *ON_CPU, "--json"],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    on_two, on_one = json.loads(done.stdout), evaluated(capsys, *words)
    measured = ("images_per_s", "threads", "calibration_error")
    assert on_two["calibration_error"] == pytest.approx(on_one["calibration_error"], rel=1e-4)
    for found in (on_two, on_one):
        for name in measured:
            del found[name]
        found["mistakes"] = {each["image"]: each["predicted"] for each in found["mistakes"]}
    assert on_two == on_one
    assert on_two["count"] == 25


def test_another_size_resamples_positions_as_fine_tuning_does(network: Path) -> None:
    small, large = mpm.load(network), mpm.load(network, image_size=(32, 16))
    assert torch.equal(
        large.backbone.positions.table, resample_table(small.backbone.positions.table, (4, 4), (8, 4))
    )
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4"):
        mpm.load(network, image_size=(18, 16))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.test.count=3"], "no checkpoint; name one or more"),
        (["A", "A", "-o", "out.png"], "-o draws one network at one size and crop; there are 2 combinations"),
        (["A", "--crops", "0.5", "1", "--mistakes", "out.png"], "--mistakes draws one network"),
        (["A", "B"], "names other test images than"),
        (["A", "B", "optim.lr=1"], "the network is what it is"),
    ],
)
def test_mistakes_on_the_command_line_are_told_before_anything_is_loaded(
    words: list[str],
    message: str,
    network: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "b"
    other.mkdir()
    text = (network / "config.yaml").read_text()
    assert "count: 64" in text
    (other / "config.yaml").write_text(text.replace("count: 64", "count: 63"))
    places = {"A": str(network), "B": str(other)}
    assert cli.main(["evaluate", *(places.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "A", "-o", "out.pdf"],
        ["evaluate", "A", "--mistakes", "out.pdf"],
        ["attention", "A", "A", "-o", "out.pdf"],
        ["reconstruct", "A", "A", "-o", "out.pdf"],
    ],
)
def test_pictures_are_png(words: list[str], network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([str(network) if word == "A" else word for word in words])
    assert "pictures are PNG; give out.pdf the ending .png" in capsys.readouterr().err


def test_attention_is_drawn_for_images_of_a_folder(
    network: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = images_in(tmp_path / "photos", lambda n, _: f"{n}.png", 3)
    words = ["-o", str(tmp_path / "out.png"), "--images", "2", "--image-size", "32x48", "--device", "cpu"]
    assert cli.main(["attention", str(network), str(root), *words]) == 0
    assert "showing the first 2 of 3 images" in caplog.text
    with Image.open(tmp_path / "out.png") as picture:
        side = 4 * 32  # enlarged; image, mean, two heads, each with two lines below, as below all
        assert picture.size == (8 + 4 * (4 * 48 + 8), 2 * (side + 2 * 17 + 4 + 8) + 2 * 17 + 16)


def test_attention_of_a_loaded_network_follows_its_readout(network: Path) -> None:
    loaded = mpm.load(network)
    found = loaded.attention(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    assert found.query == "mean over the patches, last block"
    assert found.weights.shape == (2, 1, 2, 4, 4)
