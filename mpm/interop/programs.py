"""A network as one file that runs without mpm: ONNX, or a program of torch.export."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpm.backbones.fold import fold
from mpm.interop.inference import Inference, Subject, Written

__all__ = ["write_onnx", "write_program"]

_LARGEST = 1_900_000_000  # bytes of weights in an ONNX file, which holds 2 GiB at most; more lie beside it


def write_program(network: Inference, subject: Subject, path: Path) -> Written:
    """A file for `torch.export.load`, for any number of images; parallel blocks are folded (exact)."""
    with _quiet():
        torch.export.save(_program(network, subject), path)
        run = torch.export.load(path).module()
    loading = f"""\
import torch
model = torch.export.load("{path.name}").module()
{subject.output} = model(images)  # {_images(subject)}"""
    return Written(run, loading, _notes(subject))


def write_onnx(network: Inference, subject: Subject, path: Path) -> Written:
    """A file for ONNX Runtime and others, for any number of images; parallel blocks are folded (exact).

    Raises:
        ValueError: if a package is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ValueError(
            f"--to onnx needs {error.name}: pip install 'masked-patch-modeling[export]'"
        ) from None
    # written as its parts, attention does not depend on the memory layout that one kernel or another gives
    with _quiet(), sdpa_kernel(SDPBackend.MATH):
        onnx_program = torch.onnx.export(
            _program(network, subject),
            input_names=["images"],
            output_names=[subject.output],
            dynamic_shapes={"images": {0: "batch"}},  # its name
            dynamo=True,
            verbose=False,
        )
        assert onnx_program is not None
        size = sum(tensor.nbytes for tensor in subject.state.values())
        onnx_program.save(path, external_data=size > _LARGEST)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    loading = f"""\
import onnxruntime
session = onnxruntime.InferenceSession("{path.name}")
({subject.output},) = session.run(None, {{"images": images}})  # {_images(subject)}, a numpy array"""
    return Written(
        lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        loading,
        _notes(subject),
    )


def _images(subject: Subject) -> str:
    height, width = subject.config["image_size"]
    return f"float32 [B,{subject.config['channels']},{height},{width}] in [0,1]"


def _notes(subject: Subject) -> tuple[str, ...]:
    notes = ["It takes any number of images in [0,1], and normalises them itself."]
    if subject.config["backbone"]["branches"] > 1:
        notes.append("Parallel blocks are folded into one wide attention and one wide MLP each (exact).")
    return tuple(notes)


def _program(network: Inference, subject: Subject) -> ExportedProgram:
    images = torch.zeros(2, subject.config["channels"], *subject.config["image_size"])
    # strict: the tracer that reads Python keeps the length of a batch free where it is asked for by len()
    return torch.export.export(
        fold(network), (images,), dynamic_shapes={"images": {0: Dim("batch")}}, strict=True
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torch's exporters tell their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
