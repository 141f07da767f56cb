"""Words of the commands that train, and of what fills caches for them."""

import argparse
from typing import Any

from mpm.commands.words.options import add, add_overrides


def _add_training(commands: Any) -> None:
    for name, summary, example in (
        (
            "pretrain",
            "pretrain on unlabelled images, or train a tokenizer",
            "configs/vitb_mae.yaml optim.lr=3e-4",
        ),
        (
            "finetune",
            "train a classifier, from a checkpoint or from scratch",
            "configs/finetune/vitb_in1k.yaml init.checkpoint=runs/vitb_mae",
        ),
    ):
        more = f"On several processes: torchrun --nproc_per_node=8 {name}.py --config FILE"
        command = add(commands, name, summary, more=more, example=f"mpm {name} --config {example}")
        command.add_argument(
            "--config", required=True, metavar="FILE", help="YAML, such as those in configs/"
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="build everything, take two steps, save and load, tell the facts, and leave nothing behind",
        )
        if name == "finetune":
            _add_repetition(command)
        add_overrides(command)


def _add_repetition(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seeds",
        nargs="+",
        default=[],
        metavar="SEED",
        help="train once with each, in run.output_dir/seed_SEED, and tell mean and deviation; the draw of "
        "labels follows, unless labels.seed is stated",
    )
    command.add_argument(
        "--fractions",
        nargs="+",
        default=[],
        metavar="SHARE",
        help="of the labels: train with each, on each seed, in run.output_dir/labels_SHARE/seed_SEED",
    )


def _add_tokenize(commands: Any) -> None:
    command = add(
        commands,
        "tokenize",
        "fill the cache of codes that a pretraining run reads",
        more="Computes the codes of objective.target.crops crops of each image, once, into\n"
        "objective.target.cache. Stopped, the same command continues. The run then shows these crops in\n"
        "turn, so that more epochs than crops repeat them; masks are new in each epoch.",
        example="mpm tokenize configs/vitb_beit.yaml objective.target.crops=20 objective.target.cache=codes",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of pretraining")
    add_overrides(command)


def _add_teach(commands: Any) -> None:
    command = add(
        commands,
        "teach",
        "fill the cache of a teacher's answers that a fine-tuning run reads",
        more="Asks the teacher about distillation.crops crops of each image, once, and keeps its logits in\n"
        "distillation.cache. Stopped, the same command continues. The run then shows these crops in turn,\n"
        "and takes no mixup and no erasing, which would change what the teacher sees.",
        example="mpm teach config.yaml distillation.crops=10 distillation.cache=answers.bin",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of fine-tuning")
    add_overrides(command)


TRAINING = (_add_training, _add_tokenize, _add_teach)
