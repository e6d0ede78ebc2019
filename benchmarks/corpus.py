"""The data and the model that benchmarks measure on, and the cache of measurements.

A corpus is a folder with `pool.jsonl.gz`, `targets/NAME.dev.jsonl.gz` and `targets/NAME.test.jsonl.gz`. A method gets `dev`;
`test` is used only after the model has been trained. The example folder of this repository is a corpus too: its only target,
`target`, uses every other row of `target.jsonl` as `dev` and the rest as `test`.
"""

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.datasets.storage import Sample
from service.local.demo import import_model
from service.local.stack import MODEL_NAME
from worker.influence import Samples
from worker.text.tokenization import tokenise

Row = dict[str, Any]
Split = Literal["dev", "test"]


@dataclass(frozen=True)
class Corpus:
    folder: Path

    def pool(self, count: int, seed: int) -> list[Row]:
        """The first `count` rows of the pool (all if it has fewer) in an order drawn from the seed alone."""
        rows = self._rows("pool")
        return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]

    def target(self, name: str, split: Split) -> list[Row]:
        if (self.folder / "targets").is_dir():
            return self._rows(f"targets/{name}.{split}")
        if name != "target":
            raise SystemExit(f"--targets {name}: the only target in {self.folder} is named target")
        return self._rows("target")[split == "test" :: 2]

    def _rows(self, name: str) -> list[Row]:
        for file, opened in ((f"{name}.jsonl.gz", gzip.open), (f"{name}.jsonl", open)):
            path = self.folder / file
            if path.exists():
                with opened(path, "rt") as lines:
                    return [json.loads(line) for line in lines]
        raise SystemExit(f"--corpus {self.folder}: no {name}.jsonl.gz or {name}.jsonl found")


def samples_of(rows: list[Row], tokenizer: Any, max_length: int) -> Samples:
    """The rows as the service tokenises them."""
    given = [Sample(i, row["id"], row["source"], row["messages"], None) for i, row in enumerate(rows)]
    tokenised = list(tokenise(given, tokenizer, max_length=max_length, report=lambda _: None))
    return Samples(
        input_ids=np.concatenate([row.input_ids for row in tokenised]),
        response=np.concatenate([row.response for row in tokenised]),
        offsets=np.cumsum([0, *(len(row.input_ids) for row in tokenised)]).astype(np.int64),
    )


def common_arguments(doc: str | None, *, rows: int, targets: list[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks on a corpus share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="a folder with a pool and targets (benchmarks/corpus.py)"
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for measurements, so that an interrupted run can resume"
    )
    parser.add_argument(
        "--model", type=Path, help="a model's folder; default: SmolLM2-135M-Instruct, created in the cache"
    )
    parser.add_argument("--rows", type=int, default=rows, help="rows of the pool, drawn by --seed")
    parser.add_argument("--targets", nargs="+", default=targets)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the result")
    parser.add_argument("--out", type=Path, help="folder for the results; nothing is written without it")
    return parser


def model_folder(options: argparse.Namespace) -> Path:
    if options.model is not None:
        return Path(options.model)
    import_model(options.cache, Console(stderr=True))
    return Path(options.cache / "models" / MODEL_NAME)


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path, dtype: torch.dtype, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval()


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """The tensors of one safetensors file, computed if it does not exist, and the CPU seconds that computing them took.

    The file is written atomically.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        clock, cpu = time.perf_counter(), time.process_time()
        tensors = {name: tensor.contiguous() for name, tensor in make().items()}
        spent = {"seconds": f"{time.perf_counter() - clock:.3f}", "cpu_seconds": f"{time.process_time() - cpu:.3f}"}
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        save_file(tensors, part, metadata=spent)
        part.rename(path)
    with safe_open(path, "pt") as file:
        spent = file.metadata()
    return load_file(path), float(spent["cpu_seconds"])
