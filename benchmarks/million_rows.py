"""A job on a pool of a million samples with a tiny model: the memory of every process, and the time of each phase.

    python benchmarks/million_rows.py [--rows 1000000] [--out benchmarks/results/million_rows.json]

The model has random weights and the rows are numbered sentences: the benchmark measures memory and says nothing about quality.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import MemoryWatch, commit, machine
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from service.local.stack import StackProcess
from winnow.client import Winnow

console = Console(stderr=True)
MODEL = "tiny"
WORDS = (
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "north",
    "south",
    "early",
    "late",
    "open",
    "shut",
    "warm",
    "cold",
)


def save_model(folder: Path) -> None:
    """A Llama of 4 blocks of width 64 with random weights, and a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            words = draw.choices(WORDS, k=3)
            row = {"id": f"row-{seed}-{number}", "source": words[0], "prompt": words[1], "completion": words[2]}
            file.write(json.dumps(row) + "\n")
    return path


def run(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    os.environ["WINNOW_WORKER__TOKEN_BUDGET"] = "8192"  # tiny samples of a tiny model: larger batches than the default
    os.environ["WINNOW_WORKER__THREADS"] = str(os.cpu_count())
    save_model(home / "models" / MODEL)
    process = StackProcess(home, port=0, workers=1)
    try:
        stack = process.wait_ready()
        memory = MemoryWatch(stack)
        with Winnow(stack.url, stack.api_key) as client:
            started = time.monotonic()
            pool = client.upload_dataset(write_rows(home / "pool.jsonl", arguments.rows, seed=0))
            target = client.upload_dataset(write_rows(home / "target.jsonl", 32, seed=1))
            uploaded = time.monotonic()
            job = client.create_job(
                model=MODEL,
                pool=pool["id"],
                target=target["id"],
                budget=arguments.budget,
                landmarks={"count": arguments.landmarks},
                refine=arguments.refine,
                selection=arguments.selection,
            )
            client.wait(job["id"], poll_seconds=2)
            ended = time.monotonic()
            exported = home / "weights.parquet"
            client.export(job["id"], exported, selected_only=False, include=None)
            summary = client.results(job["id"]).model_dump(mode="json")
        return {
            "upload_seconds": round(uploaded - started, 1),
            "job_seconds": round(ended - uploaded, 1),
            "export_seconds": round(time.monotonic() - ended, 1),
            "peak_memory_mib": memory.stop(),
            "stages": summary["stages"],
            "pool": summary["pool"],
            "sentences": summary["sentences"],
        }
    finally:
        process.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--budget", type=int, default=20_000)
    parser.add_argument("--landmarks", type=int, default=1024)
    parser.add_argument("--refine", type=float, default=0.05)
    parser.add_argument("--selection", default="round_robin")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    command = "python benchmarks/million_rows.py " + " ".join(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="winnow-million-") as folder:
        found = run(Path(folder), arguments)
    most = max(found["peak_memory_mib"].values())
    report = {"command": command.strip(), "commit": commit(), "machine": machine(), "most_mib": most, **found}
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    if most >= 2048:
        sys.exit(f"a process used {most} MiB; the limit is 2048")


if __name__ == "__main__":
    main()
