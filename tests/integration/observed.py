"""Runs a script as `python SCRIPT ...` does, and notes which images it opens and how it ends.

    python -m tests.integration.observed NOTES IMAGES SCRIPT [argument ...]

The audit hook sees what the interpreter opens below the folder IMAGES, in loader workers too, so that nothing
in mpm knows it is watched. Files of NOTES: `process.<rank>` (its id), `status.<rank>` (exit status, where it
ended by itself), `threads.<rank>` (names of its threads then), `opened.<rank>.<worker>.<process>` (paths, in
order).
"""

import os
import runpy
import sys
from pathlib import Path

from torch.utils.data import get_worker_info

NOTES, IMAGES = Path(sys.argv[1]), f"{sys.argv[2]}{os.sep}"
RANK = os.environ.get("RANK", "0")


def _note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).startswith(IMAGES) and (worker := get_worker_info()):
        with (NOTES / f"opened.{RANK}.{worker.id}.{os.getpid()}").open("a") as file:
            file.write(f"{arguments[0]}\n")


sys.addaudithook(_note_opened)  # here, not below: where workers are spawned, they import this module again

if __name__ == "__main__":
    NOTES.mkdir(parents=True, exist_ok=True)
    (NOTES / f"process.{RANK}").write_text(str(os.getpid()))
    sys.argv = sys.argv[3:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ending:
        threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]  # only Linux has it
        (NOTES / f"threads.{RANK}").write_text("".join(threads))
        (NOTES / f"status.{RANK}").write_text(str(ending.code))
        raise
