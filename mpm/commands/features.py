"""`mpm features`: a folder of images as vectors."""

import csv
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file

from mpm import distributed
from mpm.commands.inference import infer
from mpm.commands.outputs import appearing
from mpm.data.datasets import FolderImages
from mpm.network import load

__all__ = ["write_features"]

log = logging.getLogger(__name__)


def write_features(
    checkpoint: Path, folder: Path, *, output: Path, labelled: bool, device: str = "auto", workers: int = 0
) -> None:
    """Write the mean of the normalised patch tokens of every image that can be read; nothing is masked.

    Args:
        checkpoint: of pretraining or fine-tuning.
        folder: any tree of images; with `labelled`, one folder a class.
        output: safetensors with `features` float32 [n,D], and `labels` int64 [n], whose names are in the
            metadata `classes`, a JSON list. Beside it a CSV lists the image (and class) of each row.
        labelled: whether folders are classes.
        device: auto, cpu or cuda.
        workers: processes that read ahead.

    Raises:
        ValueError: if the folder is missing, no image can be read, or the output is to be called as the CSV.
    """
    names = output.with_suffix(".csv")
    if names == output:
        raise ValueError(
            f"{output} is where the image of each row is listed; give the features another ending, such as "
            f"{output.with_suffix('.safetensors')}"
        )
    network = load(checkpoint, device=distributed.start(device))
    source = FolderImages(folder, labels="folders" if labelled else "none", **network.reading)
    batches = list(infer(network, source, network.features, workers=workers))
    places = [place for batch in batches for place in batch.places]
    tensors = {"features": torch.cat([batch.values for batch in batches])}
    metadata = {"checkpoint": str(checkpoint), "step": str(network.step)}
    columns = {"image": [source.name(place) for place in places]}
    if source.classes is not None:
        tensors["labels"] = torch.tensor([source.label(place) for place in places])
        metadata["classes"] = json.dumps(source.classes)
        columns["class"] = [source.classes[source.label(place)] for place in places]
    with appearing(names, output) as (names_partial, output_partial):
        with names_partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        save_file(tensors, output_partial, metadata=metadata)
    n, D = tensors["features"].shape
    left_out = len(source) - n
    log.info("wrote %s: %d features of width %d; %d images could not be read", output, n, D, left_out)
    log.info("wrote %s: the image of each row", names)
