"""Fetch Fashion-MNIST to where torchvision looks for it: ROOT/FashionMNIST/raw.

    python scripts/fetch_fashion_mnist.py data

First by torchvision's own download; where that cannot be reached, from the Debian package
`dataset-fashion-mnist`, which needs apt-get but neither root nor an installation. Whole files are left alone.
"""

import argparse
import gzip
import hashlib
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger("fetch")

# Of the unpacked files. The package has name and time stripped from its gzip headers, so the MD5 sums that
# torchvision lists do not apply; with both put back (2017-08-31, 10:50:06 and 10:50:27 UTC) all four do.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PACKAGE = "dataset-fashion-mnist"
TIMEOUT_S = 20  # of no answer


class NotFetched(Exception):
    """One way did not work; the message is one line."""


def broken_files(raw: Path) -> list[str]:
    """Names of the files in `raw` that are missing or not what was published."""
    found = {name: raw / name for name in SHA256 if (raw / name).is_file()}
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
    return [name for name, published in SHA256.items() if sums.get(name) != published]


def from_torchvision(folder: Path) -> Path:
    """Download the files into `folder`; returns where they lie."""
    socket.setdefaulttimeout(TIMEOUT_S)  # torchvision sets none
    try:
        from torchvision.datasets import FashionMNIST

        return Path(FashionMNIST(folder, download=True).raw_folder)
    except Exception as error:  # whatever a network, a proxy, a moved server does
        raise NotFetched(_last_line(str(error)) or type(error).__name__) from error


def from_debian_package(folder: Path) -> Path:
    """Unpack the package into `folder`, where apt's state is too; returns where the files lie."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NotFetched("no apt-get and dpkg-deb on this machine")
    options = {
        "Dir::State": folder / "state",
        "Dir::State::Lists": folder / "state/lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "",  # as root, apt would change to a user who may not write here
        "Acquire::http::Timeout": TIMEOUT_S,
        "Acquire::Retries": 1,
    }
    for partial in ("state/lists/partial", "cache/archives/partial"):
        (folder / partial).mkdir(parents=True)
    apt = ["apt-get", "--quiet", *(f"--option={key}={value}" for key, value in options.items())]
    # A source of the machine may fail without harm, so it is the download that decides.
    subprocess.run([*apt, "update"], cwd=folder, capture_output=True)
    _checked([*apt, "download", PACKAGE], folder)
    _checked(["dpkg-deb", "--extract", str(next(folder.glob("*.deb"))), "unpacked"], folder)
    raw = folder / "unpacked/usr/share/datasets/fashion-mnist"
    for name in SHA256:
        with gzip.open(raw / f"{name}.gz") as packed, (raw / name).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return raw


def _checked(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise NotFetched(_last_line(done.stderr) or f"{command[0]} exited with {done.returncode}")


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def fetch(root: Path) -> None:
    """Make ROOT/FashionMNIST/raw complete.

    Raises:
        NotFetched: if no way worked; names each with its reason.
    """
    root = root.resolve()  # apt-get works in a folder of its own
    raw = root / "FashionMNIST" / "raw"
    if not broken_files(raw):
        log.info("Fashion-MNIST is in %s", raw)
        return
    raw.mkdir(parents=True, exist_ok=True)
    ways = {"torchvision's download": from_torchvision, f"the Debian package {PACKAGE}": from_debian_package}
    reasons = []
    for way, fetch_into in ways.items():
        log.info("fetching Fashion-MNIST: %s", way)
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as folder:
            try:
                found = fetch_into(Path(folder))
                if broken := broken_files(found):
                    raise NotFetched(f"{', '.join(broken)} is not the published file")
            except NotFetched as error:
                reasons.append(f"{way} ({error})")
                continue
            for name in SHA256:
                (found / name).replace(raw / name)
            log.info("Fashion-MNIST is in %s", raw)
            return
    raise NotFetched(
        f"Fashion-MNIST could not be fetched by {' nor by '.join(reasons)}; "
        f"connect to a network, or put {', '.join(SHA256)} into {raw}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Fetch Fashion-MNIST to ROOT/FashionMNIST/raw.")
    parser.add_argument("root", nargs="?", type=Path, default=Path("data"), help="default: data")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        fetch(parser.parse_args().root)
    except (NotFetched, OSError) as error:
        log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
