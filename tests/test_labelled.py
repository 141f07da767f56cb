"""The labelled images of fine-tuning and of probes."""

from pathlib import Path

import pytest

from mpm.labelled import open_labelled
from tests.command_line import CommandLine
from tests.integration.settings import SCRATCH, finetune_config


def test_classes_that_differ_from_those_of_training_are_named(tmp_path: Path) -> None:
    config = finetune_config(
        tmp_path, *SCRATCH, "data.image_size=16", "data.channels=3", "data.test.classes=2"
    )
    with pytest.raises(
        ValueError,
        match=r"data\.test has 2 classes, data\.train 4 \(texture_2, texture_3 without images\); name the",
    ):
        open_labelled(config)


def test_so_are_those_of_a_probe(commands: CommandLine, finetuned: Path) -> None:
    ended = commands("mpm", "probe", finetuned, "data.test.classes=2", "run.device=cpu")
    assert ended.status == 2
    assert "texture_2, texture_3 without images" in ended.complaint
