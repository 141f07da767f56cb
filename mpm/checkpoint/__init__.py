"""Checkpoints: one directory per step, complete or absent, with the hash of every file.

    <run_dir>/checkpoints/
        latest, best            text: the name of a directory
        step_00000123/
            model.safetensors   and ema.safetensors where there is an average
            train_state.pt      optimizer, random generators, ...; read with weights_only=True
            config.yaml
            manifest.json       step, metadata, tied tensors, size and sha256 of each file

A directory is written as `*.partial` and renamed when everything is on the disk. What a killed process left
behind is removed by the next save.
"""

from mpm.checkpoint.directory import write
from mpm.checkpoint.random_state import rng_state, set_rng_state
from mpm.checkpoint.run_folder import Checkpoint, best, latest, load, load_train_state, save

__all__ = [
    "Checkpoint",
    "best",
    "latest",
    "load",
    "load_train_state",
    "rng_state",
    "save",
    "set_rng_state",
    "write",
]
