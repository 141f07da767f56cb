"""Words of the commands for architectures, weights, configurations and images."""

from typing import Any

from mpm.commands.words.kinds import existing, natural, sides, utf8_path
from mpm.commands.words.options import add, add_checkpoint, add_overrides


def _add_models(commands: Any) -> None:
    command = add(
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
    command = add(
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
        "-o", "--output", type=utf8_path, required=True, metavar="DIR", help="folder to write; new or empty"
    )
    command.add_argument(
        "--heads", type=natural, metavar="N", help="attention heads, where the weights do not tell"
    )
    command.add_argument("--decoder-heads", type=natural, metavar="N", help="of MAE's decoder, likewise")
    command.add_argument(
        "--image-size",
        type=sides,
        metavar="S or HxW",
        help="pixels, where the weights do not tell; else positions are resampled to it",
    )


def _add_export(commands: Any) -> None:
    command = add(
        commands,
        "export",
        "write a network for other programs, never masked, with a model card",
        more="timm and transformers: a folder; safetensors, onnx and torch-export: a file. The card says\n"
        "how to load it, and how far its outputs are from this network's, measured at export.",
        example="mpm export runs/flowers --to onnx -o flowers.onnx",
    )
    add_checkpoint(command, "of pretraining or fine-tuning")
    formats = ("timm", "safetensors", "onnx", "torch-export", "transformers")
    command.add_argument("--to", required=True, choices=formats, help="what will read it")
    text = "timm, transformers: a folder, new or empty; else a file, .safetensors, .onnx or .pt2"
    command.add_argument("-o", "--output", type=utf8_path, required=True, metavar="OUT", help=text)


def _add_inspection(commands: Any) -> None:
    command = add(
        commands,
        "config",
        "show every value of a configuration and where it comes from",
        example="mpm config configs/vitb_mae.yaml optim.lr=3e-4",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of pretraining or fine-tuning")
    add_overrides(command)
    command = add(
        commands,
        "stats",
        "measure images: number, channels, depth, mean, deviation, broken ones",
        more="Prints the lines to paste into a configuration; of images deeper than 8 bits max_value, too.",
        example="mpm stats photos/",
    )
    command.add_argument(
        "data", type=existing, metavar="CONFIG_OR_FOLDER", help="YAML file, or folder of images"
    )
    command.add_argument(
        "--channels", type=natural, metavar="C", help="of a folder's images (default: what most have)"
    )
    add_overrides(command)


WEIGHTS = (_add_models, _add_import, _add_export, _add_inspection)
