"""What tells a registered model from another one under its name, in milliseconds: a hash of samples of its files.
The hashes of whole files are the worker's (`worker.loading.folders`)."""

import hashlib
import time
from functools import lru_cache
from pathlib import Path

from service.models.configs import ADAPTER_CONFIG, CONFIG

# The files that decide what is computed; a folder's other files (readme, pickled weights) are never read.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
MODEL_FILES = (CONFIG, ADAPTER_CONFIG, "generation_config.json", *WEIGHT_FILES)
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
)
_WHOLE = 2**20  # bytes of a file that is read from end to end; of a larger one, so many blocks
_BLOCKS, _BLOCK = 64, 2**14
_SETTLED_NS = 2 * 10**9


def relevant_files(folder: Path) -> list[Path]:
    """The regular files of the folder that decide what is computed, by name."""
    patterns = MODEL_FILES + TOKENIZER_FILES
    return sorted(p for p in folder.iterdir() if any(p.match(each) for each in patterns) and p.is_file())


def sampled_fingerprint(folder: Path) -> str | None:
    """The sha256 over the names and sizes of the model's files and evenly spread blocks of their content. None without weights,
    as on a host that holds the configuration alone. Weights that were trained further differ in every block. It is remembered
    until a file is written or replaced, since every submission asks for it.

    Raises:
        OSError: the folder or a file of it cannot be read.
    """
    found = signature(folder)
    # What was written just now may be written again within a tick of the file system's clock.
    is_settled = all(abs(time.time_ns() - modified) > _SETTLED_NS for _, _, modified, _ in found)
    return _sampled(folder, found) if is_settled else _sampled.__wrapped__(folder, found)


@lru_cache(maxsize=256)
def _sampled(folder: Path, _: tuple[tuple[str, int, int, int], ...]) -> str | None:
    files = relevant_files(folder)
    if not any(path.suffix == ".safetensors" for path in files):
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb", buffering=0) as file:
            if size <= _WHOLE:
                digest.update(file.readall())
                continue
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def signature(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Changes when one of the files is written or replaced; empty where the folder cannot be read."""
    try:
        found = [(path.name, path.stat()) for path in relevant_files(folder)]
    except OSError:
        return ()
    return tuple((name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in found)
