"""Processes: start, agree, reduce. Every function is the identity on one process.

Started by `torchrun`, the processes form one group: NCCL for CUDA tensors, gloo for CPU tensors, so flags,
counts and Python objects never touch the device.
"""

import datetime
import gc
import itertools
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its default arguments would keep a group that is there at import
from torch import Tensor, nn

from mpm.launch import available_cores

_groups = itertools.count()


def start(device: str = "auto", *, threads: int | None = None, timeout_s: float = 1800) -> torch.device:
    """Joins the processes of this run and chooses this one's device.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        threads: CPU threads of this process; None shares the cores out, see `threads_per_process`.
        timeout_s: how long a process waits for the others in one collective.

    Raises:
        ValueError: if `device` is unknown, or there are fewer GPUs than processes on this machine.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"run.device {device!r} is unknown; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "the device is to be cuda, but torch finds none; use run.device=cpu (or --device cpu)"
        )
    if device == "cpu" or not torch.cuda.is_available():
        chosen = torch.device("cpu")
        threads = threads or threads_per_process(os.environ, available_cores())
    else:
        gpus = torch.cuda.device_count()
        if local_rank() >= gpus:
            raise ValueError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {gpus} GPUs; "
                f"use torchrun --nproc-per-node={gpus}"
            )
        chosen = torch.device("cuda", local_rank())
        torch.cuda.set_device(chosen)
    if threads is not None:
        torch.set_num_threads(threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timeout = datetime.timedelta(seconds=timeout_s)
        store, own_rank, processes = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl",
            # a second group would find the addresses of the first in the store, and wait there for ever
            store=dist.PrefixStore(f"mpm {next(_groups)}", store),
            rank=own_rank,
            world_size=processes,
            timeout=timeout,
            device_id=None if chosen.type == "cpu" else chosen,
        )
    return chosen


def stop() -> None:
    """Leaves the group of processes and ends its threads, where nobody holds a DDP module any more.

    A thread of gloo that lives on may free a tensor while the interpreter shuts down, and aborts the process.
    """
    if dist.is_initialized():
        gc.collect()  # DDP modules are in cycles
        dist.destroy_process_group()


def fails_first() -> bool:
    """Whether this process is the first that asks: of all that fail, the one that has to say why.

    It takes no collective: the others may wait in one, or be gone.
    """
    if world_size() == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        return bool(store.add("mpm failed", 1) == 1)
    except RuntimeError:  # the store was in a process that is gone
        return False


def threads_per_process(environ: Mapping[str, str], cores: int) -> int | None:
    """CPU threads of one of `LOCAL_WORLD_SIZE` processes; None where torch's own choice stands.

    torchrun sets OMP_NUM_THREADS=1 for several processes where the user set nothing. A 1 under torchrun is
    therefore nobody's choice; any other value is the user's. Who wants one thread passes `threads=1`.
    """
    processes = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ and environ.get("OMP_NUM_THREADS") == "1"
    if processes == 1 or ("OMP_NUM_THREADS" in environ and not by_torchrun):
        return None
    return max(1, cores // processes)


def rank() -> int:
    """Number of this process among all of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def barrier() -> None:
    """Waits until every process is here; work queued on a GPU is not waited for."""
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process. One small message between CPUs."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over the processes, a new tensor of the same shape; outside autograd."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenates [n_r, ...] of every process in rank order; the n_r may differ. Outside autograd."""
    if world_size() == 1:
        return tensor.detach()
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(tensor)))
    most = max(int(count) for count in counts)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[: int(count)] for rows, count in zip(gathered, counts, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any, src: int = 0) -> Any:
    """The value that process `src` has."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=src)
    return values[0]


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first, which is what a checkpoint holds."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def differentiable_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes that gradients flow through: backward sums the gradients over the processes.

    For statistics of a batch that is spread over processes (torch's SyncBatchNorm does not run on a CPU).
    """
    return tensor if world_size() == 1 else _DifferentiableSum.apply(tensor)


class _DifferentiableSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])
