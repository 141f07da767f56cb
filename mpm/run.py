"""One run: its folder, what it continues from, and how it saves. Both scripts use it."""

import functools
import itertools
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpm import checkpoint, configfile, distributed, partial
from mpm.backbones.blocks import Block, ClassAttentionBlock, ParallelBlock
from mpm.config import FinetuneConfig, ImportedConfig, PretrainConfig, ProbeConfig, TokenizerConfig
from mpm.launch import give_way
from mpm.training.allocator import keep_freed_memory
from mpm.training.reporting import Reporter

__all__ = [
    "Run",
    "compile_blocks",
    "log_facts",
    "parallel",
    "refusal",
    "seed_everything",
    "started",
    "write_picture",
]

log = logging.getLogger(__name__)


@contextmanager
def started(
    config: PretrainConfig | TokenizerConfig | FinetuneConfig | ImportedConfig | ProbeConfig,
) -> Iterator[torch.device]:
    """Processes, threads and allocator of a run; leaves the process group at the end.

    Where several processes fail, the first raises what happened, and the others end without a word.
    """
    device = distributed.start(config.run.device, threads=config.run.threads)
    try:
        if device.type == "cpu" and config.run.tune_allocator:
            keep_freed_memory()
        yield device
    except Exception as error:
        if distributed.fails_first():
            raise
        give_way()
        raise SystemExit(1) from error
    finally:
        _stop_logging_to_files()
        distributed.stop()


def seed_everything(seed: int) -> None:
    """Seed the global generators, which dropped paths, mixing and erasing draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  timm's Mixup draws from it


def parallel(objective: nn.Module, device: torch.device) -> nn.Module:
    """The objective, in DDP where there are several processes and gradients to exchange."""
    if distributed.world_size() == 1 or not any(p.requires_grad for p in objective.parameters()):
        return objective
    return DistributedDataParallel(objective, device_ids=[device] if device.type == "cuda" else None)


def compile_blocks(objective: nn.Module, choice: str | bool, device: torch.device) -> None:
    """`torch.compile` for each block in place; names of parameters stay."""
    if choice is True or (choice == "auto" and device.type == "cuda"):
        for block in objective.modules():
            if isinstance(block, Block | ParallelBlock | ClassAttentionBlock):
                block.compile()


def log_facts(facts: dict[str, str]) -> None:
    """One block that says what is about to happen."""
    width = max(map(len, facts))
    log.info("\n".join(["what runs:", *(f"  {name:<{width}}  {fact}" for name, fact in facts.items())]))


def write_picture(file: Path, picture: Tensor) -> None:
    """Write uint8 [3,H,W] as PNG, on the main process."""
    if distributed.is_main():
        from PIL import Image

        Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(file, format="PNG")


def _log_to(file: Path) -> None:
    """Write what is logged to a file too; lines of earlier processes of the run stay."""
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")  # as stderr
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("mpm").addHandler(handler)


def _stop_logging_to_files() -> None:
    """The next run in this process has a log of its own."""
    logger = logging.getLogger("mpm")
    for handler in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()


def refusal(config: PretrainConfig | TokenizerConfig | FinetuneConfig) -> str | None:
    """Why a run must not write to its folder; None: it may, as to one whose run never saved anything."""
    folder = Path(config.run.output_dir)
    written = folder / "config.yaml"
    if not written.exists() or not any((folder / "checkpoints").glob("step_*")):
        return None
    ways = "choose another run.output_dir, or remove that folder"
    if config.run.resume == "never":
        return f"{folder} already holds a run and run.resume is never; {ways}"
    try:
        earlier, _ = configfile.load(written, [], type(config))
    except configfile.ConfigError as error:
        reason = str(error).splitlines()[0]
        return f"{folder} already holds another kind of run, or one that cannot be read ({reason}); {ways}"
    differing = configfile.same_run(earlier, config)
    if differing:
        return f"{folder} already holds a different run (differs in {', '.join(differing)}); {ways}"
    return None


class Run:
    """The folder of a run.

    Args:
        config: resolved, as it is written to the folder and into every checkpoint.
        kind: "pretrain", "tokenizer" or "finetune".

    Attributes:
        folder: `run.output_dir`.
        resumes_from: the newest complete checkpoint of this same run, if there is one.

    Raises:
        ValueError: if the folder holds a different run, or any where `run.resume` is never.
    """

    def __init__(self, config: PretrainConfig | TokenizerConfig | FinetuneConfig, kind: str):
        self.config = config
        self.kind = kind
        self.folder = Path(config.run.output_dir)
        self.resumes_from: Path | None = None
        reason = None
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.resumes_from = checkpoint.latest(self.folder)
            reason = refusal(config)
        self.resumes_from, reason = distributed.broadcast_object((self.resumes_from, reason))
        if reason:
            raise ValueError(reason)
        if distributed.is_main():
            written = self.folder / "config.yaml"
            new = written.with_suffix(".partial")
            new.write_text(configfile.dump(config), encoding="utf-8")
            new.replace(written)  # whole or as it was, also on a full disk
            if self.resumes_from is None:
                (self.folder / "result.json").unlink(missing_ok=True)  # of a run that never saved
            _log_to(self.folder / "log.txt")

    def has(self, name: str) -> bool:
        """Whether the folder holds a file, as the main process sees it."""
        return bool(distributed.broadcast_object((self.folder / name).exists()))

    def save(
        self,
        step: int,
        *,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        reporter: Reporter,
        ema: Any = None,
        metadata: dict[str, Any],
        best: bool = False,
    ) -> Path:
        """A checkpoint, on every process; see `mpm.checkpoint`. Where `metadata` has a base, without it."""
        device = _device_of(objective)
        base = metadata.get("base")
        own = {"rng": checkpoint.rng_state(device), "reporter": reporter.state_dict()}
        train_state = {
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "processes": distributed.gather_objects(own),
        }
        with reporter.paused():
            begin = time.perf_counter()
            path = checkpoint.save(
                self.folder,
                step=step,
                config=self.config.model_dump(mode="json"),
                metadata={"kind": self.kind, **metadata},
                model=partial.without_base(objective.state_dict(), base),
                ema=None if ema is None else partial.without_base(ema.module.state_dict(), base),
                train_state=train_state,
                keep=self.config.run.keep,
                best=best,
            )
            log.info("saved %s in %.1f s", path, time.perf_counter() - begin)
        return path

    def restore(
        self,
        *,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        reporter: Reporter,
        ema: Any = None,
        data: dict[str, Any],
    ) -> tuple[int, dict[str, Any]]:
        """Continue where the newest checkpoint stopped; on the same number of processes bit by bit.

        Args:
            objective: gets its weights.
            optimizer: gets its state.
            reporter: gets the window of its log.
            ema: gets its average.
            data: what must not have changed since, as `save` was given it under "data".

        Returns: finished steps (0 for a new run) and the checkpoint's metadata.

        Raises:
            ValueError: if the data is another, or the checkpoint is broken.
        """
        if self.resumes_from is None:
            reporter.resume(0)
            reporter.text("config", f"```yaml\n{configfile.dump(self.config)}```")
            return 0, {}
        saved = partial.load(self.resumes_from)
        for name, now in data.items():
            if (then := saved.metadata["data"].get(name)) != now:
                raise ValueError(
                    f"{self._difference(name, then, now)}; restore what was, or choose another run.output_dir"
                )
        state = checkpoint.load_train_state(self.resumes_from)
        objective.load_state_dict(saved.model)
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            assert saved.ema is not None
            ema.module.load_state_dict(saved.ema)
        reporter.resume(saved.step)
        processes = state["processes"]
        if len(processes) == distributed.world_size():
            own = processes[distributed.rank()]
            device = _device_of(objective)
            reporter.load_state_dict(own["reporter"], device=device)
            checkpoint.set_rng_state(own["rng"], device)
        else:
            log.warning(
                "%d processes continue a run of %d: same images and rates, other draws inside the network",
                distributed.world_size(),
                len(processes),
            )
        log.info("continuing %s from step %d", self.folder, saved.step)
        return saved.step, saved.metadata

    def _difference(self, name: str, then: Any, now: Any) -> str:
        """What is not as when the run began."""
        if name in ("images", "classes"):
            what = f"the training data has other {name} than when {self.folder} began"
        elif "." in name:  # a digest tells nobody anything
            path = functools.reduce(getattr, name.split("."), self.config)
            return f"{name} {path} has other weights than when {self.folder} began: trained on, or replaced"
        else:
            what = f"the {name} is another than when {self.folder} began"
        return f"{what}: {_shortened(now)}, not {_shortened(then)}"


def _device_of(objective: nn.Module) -> torch.device:
    """Where it is; k-means has buffers only."""
    return next(itertools.chain(objective.parameters(), objective.buffers())).device


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
