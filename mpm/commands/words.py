"""The words of the `mpm` command line and their help; nothing here imports torch."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mpm.launch import available_cores, give_way, is_first_process

__all__ = ["FREE_TO_CHANGE", "parse"]

FREE_TO_CHANGE = ("run", "data.test", "data.test_crop", "data.interpolation")  # when evaluating
_USAGE = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        told = f"mpm: {message}; see {self.prog} --help\n"
        if not is_first_process():
            give_way()
            self.exit(_USAGE)
        self.exit(_USAGE, told)


def parse(words: list[str]) -> argparse.Namespace:
    """Options of a command; its name is `command`. A mistake ends the process with status 2 and one line."""
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    # argparse takes a list only where it stands together, but options may stand between its words
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "words")):
        parser.error(f"{' '.join(rest)} means nothing here")
    try:
        options.words = getattr(options, "words", []) + [options.word(word) for word in rest]
        for name, kind in _lists().items():
            if isinstance(given := getattr(options, name, None), list) and given:
                setattr(options, name, _numbers(given, kind, options))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return options


def _lists() -> dict[str, Callable[[str], Any]]:
    """Options that take several numbers, and what reads one."""
    return {
        "seeds": _natural,
        "fractions": _share,
        "labels": _natural,
        "image_sizes": _sides,
        "crops": _share,
    }


def _numbers(given: list[str], kind: Callable[[str], Any], options: argparse.Namespace) -> list[Any]:
    """The numbers of a list that has also taken the words after it, which join the others."""
    words = [word for word in given if "=" in word or (Path(word).expanduser() / "config.yaml").is_file()]
    numbers = [kind(word) for word in given if word not in words]
    if not numbers:
        raise argparse.ArgumentTypeError(f"no number stands before {given[0]}")
    options.words += [options.word(word) for word in words]
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpm",
        description="Masked-patch pretraining of vision transformers, fine-tuning, and what comes after.",
        epilog="`mpm COMMAND --help` tells more, with an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for add in (
        _add_training,
        _add_tokenize,
        _add_teach,
        _add_predict,
        _add_evaluate,
        _add_attention,
        _add_reconstruct,
        _add_features,
        _add_probe,
        _add_models,
        _add_import,
        _add_export,
        _add_inspection,
    ):
        add(commands)
    return parser


def _add(
    commands: Any,
    name: str,
    summary: str,
    *,
    more: str = "",
    example: str,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n{more}".strip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=name, word=str)
    return command


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
        command = _add(commands, name, summary, more=more, example=f"mpm {name} --config {example}")
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
        _add_overrides(command)


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
    command = _add(
        commands,
        "tokenize",
        "fill the cache of codes that a pretraining run reads",
        more="Computes the codes of objective.target.crops crops of each image, once, into\n"
        "objective.target.cache. Stopped, the same command continues. The run then shows these crops in\n"
        "turn, so that more epochs than crops repeat them; masks are new in each epoch.",
        example="mpm tokenize configs/vitb_beit.yaml objective.target.crops=20 objective.target.cache=codes",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of pretraining")
    _add_overrides(command)


def _add_teach(commands: Any) -> None:
    command = _add(
        commands,
        "teach",
        "fill the cache of a teacher's answers that a fine-tuning run reads",
        more="Asks the teacher about distillation.crops crops of each image, once, and keeps its logits in\n"
        "distillation.cache. Stopped, the same command continues. The run then shows these crops in turn,\n"
        "and takes no mixup and no erasing, which would change what the teacher sees.",
        example="mpm teach config.yaml distillation.crops=10 distillation.cache=answers.bin",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of fine-tuning")
    _add_overrides(command)


def _add_predict(commands: Any) -> None:
    command = _add(
        commands,
        "predict",
        "tell the classes of images, as CSV",
        more="Columns: image, class, probability, then the probability of each class; with more than 20\n"
        "classes the second to fifth best class and their probabilities. Images that cannot be read are\n"
        "named on stderr, left out and counted. Bytes of a name that are not UTF-8 are written as \\xE9.",
        example="mpm predict runs/flowers photos/ more/rose.jpg -o classes.csv",
    )
    _add_checkpoint(command, "of fine-tuning")
    _add_images(command)
    command.add_argument(
        "-o", "--output", type=_output, metavar="FILE", help="CSV; by default standard output"
    )
    _add_device(command)
    _add_workers(command)


def _add_evaluate(commands: Any) -> None:
    command = _add(
        commands,
        "evaluate",
        "score fine-tuned checkpoints on their test images, or on others",
        more="Of one: top-1, top-5, balanced accuracy, macro F1, calibration error, images per second, and\n"
        "precision, recall and F1 of each class. Of several, or at several sizes or crops: a table.\n"
        "Folders named 0, 1, 2, ... are classes by number, as in ImageNet-V2.",
        example="mpm evaluate runs/flowers data.test.kind=folder data.test.root=photos -o confusion.png",
    )
    command.set_defaults(word=_checkpoint_or_override)
    command.add_argument(
        "words",
        nargs="+",
        type=_checkpoint_or_override,
        metavar="CHECKPOINT or key=value",
        help="of fine-tuning: a run's folder (its best, else its newest), a step_* in it, or a folder of mpm "
        f"import; other test images: replaces values of {', '.join(FREE_TO_CHANGE)}",
    )
    command.add_argument(
        "--image-sizes",
        nargs="+",
        metavar="S or HxW",
        help="pixels; positions are resampled (default: those of training)",
    )
    command.add_argument(
        "--crops",
        nargs="+",
        metavar="SHARE",
        help="side of the centre crop over the resized image's (default: data.test_crop)",
    )
    command.add_argument(
        "--real",
        type=_existing,
        metavar="FILE",
        help="ReaL labels of ImageNet's validation images, real.json",
    )
    command.add_argument(
        "-o", "--output", type=_output, metavar="FILE", help="picture of the confusion matrix, PNG"
    )
    command.add_argument(
        "--mistakes", type=_output, metavar="FILE", help="picture of the surest mistakes, PNG"
    )
    command.add_argument("--json", action="store_true", help="print JSON, with the confusion matrix of one")


def _add_attention(commands: Any) -> None:
    command = _add(
        commands,
        "attention",
        "draw where a network looks",
        more="A row for each image: the image, the mean over the heads, each head. Shown is what\n"
        "the vector of the image is read with: the class token's attention in the last block, the class\n"
        "attention of CaiT (a row for each of its blocks), or the mean over the patches in the last block.",
        example="mpm attention runs/flowers photos/*.jpg -o attention.png",
    )
    _add_checkpoint(command, "of pretraining or fine-tuning")
    _add_images(command)
    command.add_argument("-o", "--output", type=_output, required=True, metavar="FILE", help="picture, PNG")
    command.add_argument(
        "--query", choices=("class_token", "patches"), help="what asks in the last block, where not the above"
    )
    command.add_argument(
        "--image-size", type=_sides, metavar="S or HxW", help="pixels (default: those of training)"
    )
    command.add_argument(
        "--images", type=_natural, default=8, metavar="N", help="show at most so many (default 8)"
    )
    _add_device(command)


def _add_reconstruct(commands: Any) -> None:
    command = _add(
        commands,
        "reconstruct",
        "draw what a pretrained network sees behind the mask",
        more="A column for each image, 32 at most: original, masked, reconstructed.",
        example="mpm reconstruct runs/vitb_mae photos/*.jpg -o reconstructions.png",
    )
    _add_checkpoint(command, "of pretraining")
    _add_images(command)
    command.add_argument("-o", "--output", type=_output, required=True, metavar="FILE", help="picture, PNG")
    command.add_argument("--seed", type=_natural, metavar="N", default=0, help="of the masks (default 0)")
    _add_device(command)


def _add_features(commands: Any) -> None:
    command = _add(
        commands,
        "features",
        "write the feature vectors of a folder of images; nothing is masked",
        more="Writes `features` [n,D], the mean of the normalised patch tokens, and a CSV beside it that\n"
        "names the image of each row, bytes that are not UTF-8 as \\xE9. Images that cannot be read are\n"
        "left out and counted.",
        example="mpm features runs/vitb_mae photos/ -o features.safetensors --labels",
    )
    _add_checkpoint(command, "of pretraining or fine-tuning")
    command.add_argument("data", type=_folder, metavar="DATA", help="folder of images, any tree")
    command.add_argument("-o", "--output", type=_output, required=True, metavar="FILE", help="safetensors")
    command.add_argument(
        "--labels", action="store_true", help="DATA has one folder a class: write `labels` [n] too"
    )
    _add_device(command)
    _add_workers(command)


def _add_probe(commands: Any) -> None:
    command = _add(
        commands,
        "probe",
        "score frozen features layer by layer: k-NN, linear and attentive probes",
        more="Settings and the best layer are chosen on held-out training features, never on test images.\n"
        "Images are the checkpoint's own where none are given.",
        example="mpm probe runs/vitb_mae --train photos --test photos --attentive",
    )
    _add_checkpoint(command, "of pretraining or fine-tuning")
    for part in ("train", "test"):
        text = "labelled images: a folder with one folder a class, or a configuration, whose own are taken"
        command.add_argument(f"--{part}", type=_existing, metavar="FOLDER_OR_CONFIG", help=text)
    _add_overrides(command, "replaces a value, as data.test_crop=0.875, k=10 or run.workers=4")
    command.add_argument("--attentive", action="store_true", help="also a query that attends to the patches")
    command.add_argument(
        "--memory", type=float, default=4.0, metavar="GIB", help="for its patch tokens (default 4)"
    )
    command.add_argument(
        "--labels", nargs="+", default=[], metavar="N", help="with so many labels instead of all"
    )
    command.add_argument(
        "--fractions", nargs="+", default=[], metavar="F", help="with such shares of the labels"
    )
    command.add_argument("--seeds", nargs="+", default=["0"], metavar="S", help="of the draws (default 0)")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_models(commands: Any) -> None:
    command = _add(
        commands,
        "models",
        "list the published architectures: resolution, parameters, GMACs, paper",
        more="Parameters are counted as the official weights hold them, with 1000 classes; GMACs are\n"
        "billions of multiply-accumulates of one image's forward pass. vit_b_6x6 is any N x P.",
        example="mpm models 'vit_b_*' stem.kind=hmlp layer_scale=1e-4",
    )
    text = (
        "names, parts of them or patterns, as 'cait_*' (default: all); "
        "key=value replaces a value of the architecture, as layer_scale=1e-4"
    )
    command.add_argument("words", nargs="*", metavar="PATTERN or key=value", help=text)
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_import(commands: Any) -> None:
    command = _add(
        commands,
        "import",
        "bring weights that others trained",
        more="SOURCE is a file of DeiT, DeiT III, CaiT, BEiT, BEiT v2, MAE, SimMIM, Three things or timm,\n"
        "a folder of Hugging Face transformers (ViT, DeiT, BEiT, ViTMAE), or timm:NAME. Tells every key\n"
        "that was resized, dropped or is missing; what is not understood is an error, and nothing in a\n"
        "file is ever executed.",
        example="mpm import deit_small_patch16_224-cd65a155.pth -o weights/deit_s",
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="file, folder, timm:NAME, timm:hf-hub:OWNER/NAME or timm:local-dir:FOLDER",
    )
    command.add_argument(
        "-o", "--output", type=_path, required=True, metavar="DIR", help="folder to write; new or empty"
    )
    command.add_argument(
        "--heads", type=_natural, metavar="N", help="attention heads, where the weights do not tell"
    )
    command.add_argument("--decoder-heads", type=_natural, metavar="N", help="of MAE's decoder, likewise")
    command.add_argument(
        "--image-size",
        type=_sides,
        metavar="S or HxW",
        help="pixels, where the weights do not tell; else positions are resampled to it",
    )


def _add_export(commands: Any) -> None:
    command = _add(
        commands,
        "export",
        "write a network for other programs, never masked, with a model card",
        more="timm and transformers: a folder; safetensors, onnx and torch-export: a file. The card says\n"
        "how to load it, and how far its outputs are from this network's, measured at export.",
        example="mpm export runs/flowers --to onnx -o flowers.onnx",
    )
    _add_checkpoint(command, "of pretraining or fine-tuning")
    formats = ("timm", "safetensors", "onnx", "torch-export", "transformers")
    command.add_argument("--to", required=True, choices=formats, help="what will read it")
    text = "timm, transformers: a folder, new or empty; else a file, .safetensors, .onnx or .pt2"
    command.add_argument("-o", "--output", type=_path, required=True, metavar="OUT", help=text)


def _add_inspection(commands: Any) -> None:
    command = _add(
        commands,
        "config",
        "show every value of a configuration and where it comes from",
        example="mpm config configs/vitb_mae.yaml optim.lr=3e-4",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of pretraining or fine-tuning")
    _add_overrides(command)
    command = _add(
        commands,
        "stats",
        "measure images: number, channels, depth, mean, deviation, broken ones",
        more="Prints the lines to paste into a configuration; of images deeper than 8 bits max_value, too.",
        example="mpm stats photos/",
    )
    command.add_argument(
        "data", type=_existing, metavar="CONFIG_OR_FOLDER", help="YAML file, or folder of images"
    )
    command.add_argument(
        "--channels", type=_natural, metavar="C", help="of a folder's images (default: what most have)"
    )
    _add_overrides(command)


def _add_overrides(
    command: argparse.ArgumentParser, what: str = "replaces a value of the file, as optim.lr=3e-4"
) -> None:
    command.add_argument("words", nargs="*", metavar="key=value", help=what)


def _add_checkpoint(command: argparse.ArgumentParser, kind: str) -> None:
    text = f"{kind}: a run's folder (its best, else its newest), a step_* in it, or a folder of mpm import"
    command.add_argument("checkpoint", type=_checkpoint, metavar="CHECKPOINT", help=text)


def _add_images(command: argparse.ArgumentParser) -> None:
    command.set_defaults(word=_existing)
    command.add_argument(
        "words", nargs="+", type=_existing, metavar="IMAGES", help="image files, and folders of them"
    )


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _add_workers(command: argparse.ArgumentParser) -> None:
    most = min(4, available_cores())
    text = f"processes that read images (default {most})"
    command.add_argument("--workers", type=_natural, default=most, metavar="N", help=text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 on")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; use a number above 0, at most 1, as 0.875")
    return share


def _sides(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _natural(height), _natural(width or height)


def _existing(text: str) -> Path:
    if not (path := Path(text).expanduser()).exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def _folder(text: str) -> Path:
    if not (path := Path(text).expanduser()).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder; give a folder of images")
    return path


def _path(text: str) -> Path:
    """One that safetensors reads, and that a model card can tell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"the name {text} is not UTF-8; use another, or a link") from None
    return Path(text).expanduser()


def _checkpoint(text: str) -> Path:
    if not ((path := _path(text)) / "config.yaml").is_file():
        raise argparse.ArgumentTypeError(
            f"no checkpoint in {text}; give a run's folder or a checkpoints/step_* in it"
        )
    return path


def _checkpoint_or_override(text: str) -> Path | str:
    return text if "=" in text and not Path(text).exists() else _checkpoint(text)


def _output(text: str) -> Path:
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist; make it first")
    return path
