"""Words of the commands that use a checkpoint."""

from typing import Any

from mpm.commands.checkpoints import FREE_TO_CHANGE
from mpm.commands.words.kinds import checkpoint_or_override, existing, folder, natural, output, picture, sides
from mpm.commands.words.options import add, add_checkpoint, add_device, add_images, add_overrides, add_workers


def _add_predict(commands: Any) -> None:
    command = add(
        commands,
        "predict",
        "tell the classes of images, as CSV",
        more="Columns: image, class, probability, then the probability of each class; with more than 20\n"
        "classes the second to fifth best class and their probabilities. Images that cannot be read are\n"
        "named on stderr, left out and counted. Bytes of a name that are not UTF-8 are written as \\xE9.",
        example="mpm predict runs/flowers photos/ more/rose.jpg -o classes.csv",
    )
    add_checkpoint(command, "of fine-tuning")
    add_images(command)
    command.add_argument(
        "-o", "--output", type=output, metavar="FILE", help="CSV; by default standard output"
    )
    add_device(command)
    add_workers(command)


def _add_evaluate(commands: Any) -> None:
    command = add(
        commands,
        "evaluate",
        "score fine-tuned checkpoints on their test images, or on others",
        more="Of one: top-1, top-5, balanced accuracy, macro F1, calibration error, images per second, and\n"
        "precision, recall and F1 of each class. Of several, or at several sizes or crops: a table.\n"
        "Folders named 0, 1, 2, ... are classes by number, as in ImageNet-V2.",
        example="mpm evaluate runs/flowers data.test.kind=folder data.test.root=photos -o confusion.png",
    )
    command.set_defaults(word=checkpoint_or_override)
    command.add_argument(
        "words",
        nargs="+",
        type=checkpoint_or_override,
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
        type=existing,
        metavar="FILE",
        help="ReaL labels of ImageNet's validation images, real.json",
    )
    command.add_argument(
        "-o", "--output", type=picture, metavar="FILE", help="picture of the confusion matrix, PNG"
    )
    command.add_argument(
        "--mistakes", type=picture, metavar="FILE", help="picture of the surest mistakes, PNG"
    )
    command.add_argument(
        "--json", action="store_true", help="print JSON, of one with its confusion matrix and mistakes"
    )


def _add_attention(commands: Any) -> None:
    command = add(
        commands,
        "attention",
        "draw where a network looks",
        more="A row for each image: the image, the mean over the heads, each head. Shown is what\n"
        "the vector of the image is read with: the class token's attention in the last block, the class\n"
        "attention of CaiT (a row for each of its blocks), or the mean over the patches in the last block.",
        example="mpm attention runs/flowers photos/*.jpg -o attention.png",
    )
    add_checkpoint(command, "of pretraining or fine-tuning")
    add_images(command)
    command.add_argument("-o", "--output", type=picture, required=True, metavar="FILE", help="picture, PNG")
    command.add_argument(
        "--query", choices=("class_token", "patches"), help="what asks in the last block, where not the above"
    )
    command.add_argument(
        "--image-size", type=sides, metavar="S or HxW", help="pixels (default: those of training)"
    )
    command.add_argument(
        "--images", type=natural, default=8, metavar="N", help="show at most so many (default 8)"
    )
    add_device(command)


def _add_reconstruct(commands: Any) -> None:
    command = add(
        commands,
        "reconstruct",
        "draw what a pretrained network sees behind the mask",
        more="A column for each image, 32 at most: original, masked, reconstructed.",
        example="mpm reconstruct runs/vitb_mae photos/*.jpg -o reconstructions.png",
    )
    add_checkpoint(command, "of pretraining")
    add_images(command)
    command.add_argument("-o", "--output", type=picture, required=True, metavar="FILE", help="picture, PNG")
    command.add_argument("--seed", type=natural, metavar="N", default=0, help="of the masks (default 0)")
    add_device(command)


def _add_features(commands: Any) -> None:
    command = add(
        commands,
        "features",
        "write the feature vectors of a folder of images; nothing is masked",
        more="Writes `features` [n,D], the mean of the normalised patch tokens, and a CSV beside it that\n"
        "names the image of each row, bytes that are not UTF-8 as \\xE9. Images that cannot be read are\n"
        "left out and counted.",
        example="mpm features runs/vitb_mae photos/ -o features.safetensors --labels",
    )
    add_checkpoint(command, "of pretraining or fine-tuning")
    command.add_argument("data", type=folder, metavar="DATA", help="folder of images, any tree")
    command.add_argument("-o", "--output", type=output, required=True, metavar="FILE", help="safetensors")
    command.add_argument(
        "--labels", action="store_true", help="DATA has one folder a class: write `labels` [n] too"
    )
    add_device(command)
    add_workers(command)


def _add_probe(commands: Any) -> None:
    command = add(
        commands,
        "probe",
        "score frozen features layer by layer: k-NN, linear and attentive probes",
        more="Settings and the best layer are chosen on held-out training features, never on test images.\n"
        "Images are the checkpoint's own where none are given. Of a model of timm the output is scored.",
        example="mpm probe runs/vitb_mae --train photos --test photos --attentive",
    )
    add_checkpoint(command, "of pretraining or fine-tuning")
    for part in ("train", "test"):
        text = "labelled images: a folder with one folder a class, or a configuration, whose own are taken"
        command.add_argument(f"--{part}", type=existing, metavar="FOLDER_OR_CONFIG", help=text)
    add_overrides(command, "replaces a value, as data.test_crop=0.875, k=10 or run.workers=4")
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


LOOKING = (_add_predict, _add_evaluate, _add_attention, _add_reconstruct, _add_features, _add_probe)
