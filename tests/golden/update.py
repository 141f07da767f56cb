"""Rewrites the golden numbers: python -m tests.golden.update

Only where a change of numbers is meant; the diff is reviewed, and the commit's subject says [golden].
"""

import json
import tempfile
from pathlib import Path

import torch

from tests.golden.curves import NAMES, curve, file_of


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            golden = {"torch": torch.__version__, **curve(name, Path(folder))._asdict()}
            file_of(name).write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
