"""Contenders in processes of their own: allocators, threads and peak memory are separate."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from benchmarks.measuring import peak_memory_bytes


def _serve(
    connection: Connection, start: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]
) -> None:
    """What runs there: takes numbers of steps, gives their seconds; None asks for the peak memory."""
    step = start(*arguments)
    device = next(argument for argument in arguments if isinstance(argument, torch.device))
    while (steps := connection.recv()) is not None:
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        connection.send(seconds)
    connection.send(peak_memory_bytes(device))


class StepProcess:
    """A step that waits on a pipe while another one is timed.

    Args:
        start: called there, gives the step.
        arguments: its; one is the device.
    """

    def __init__(self, start: Callable[..., Callable[[], object]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, start, arguments))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()  # ends its wait
        self._process.join(10)
        self._process.terminate()

    def run(self, steps: int) -> list[float]:
        """Their seconds."""
        self._connection.send(steps)
        return self._connection.recv()

    def peak_memory_bytes(self) -> int:
        """So far; it runs no further steps."""
        self._connection.send(None)
        return self._connection.recv()
