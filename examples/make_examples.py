"""Write the example data: pool.jsonl, a mixed pool of samples, and target.jsonl, what a model should learn.

    python examples/make_examples.py --out examples

The output depends on the seed alone: each run writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from kinds.arithmetic import unit_conversion, word_problem
from kinds.code import json_extract, python_function, sql_query, target_python_function
from kinds.common import Conversation, Kind
from kinds.everyday import geography, ordering, polite_email
from kinds.language import grammar_fix, sentiment, synonym_antonym, translate_french

SEED = 20250
SAMPLES_PER_KIND = 50
TARGET_SAMPLES = 24

POOL_KINDS: dict[str, Kind] = {
    "word_problem": word_problem,
    "unit_conversion": unit_conversion,
    "translate_french": translate_french,
    "grammar_fix": grammar_fix,
    "synonym_antonym": synonym_antonym,
    "sentiment": sentiment,
    "python_function": python_function,
    "sql_query": sql_query,
    "json_extract": json_extract,
    "polite_email": polite_email,
    "ordering": ordering,
    "geography": geography,
}

Row = dict[str, object]


def make_row(row_id: str, source: str, conversation: Conversation) -> Row:
    """One sample in the chat form."""
    messages: list[dict[str, str]] = []
    for prompt, reply in conversation:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {"id": row_id, "source": source, "messages": messages}


def make_pool(seed: int = SEED) -> list[Row]:
    """All pool rows in shuffled order; each kind has its own random stream, so that kinds can change alone."""
    rows: list[Row] = []
    for name, kind in POOL_KINDS.items():
        conversations = kind(Random(f"{seed}/{name}"), SAMPLES_PER_KIND)
        rows += [make_row(f"{name}-{i:04d}", name, conversation) for i, conversation in enumerate(conversations)]
    Random(f"{seed}/order").shuffle(rows)
    return rows


def make_target(seed: int = SEED) -> list[Row]:
    """The target rows: Python functions that the pool does not have, asked for in other wordings."""
    conversations = target_python_function(Random(f"{seed}/target"), TARGET_SAMPLES)
    return [
        make_row(f"target-{i:04d}", "python_function", conversation) for i, conversation in enumerate(conversations)
    ]


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line, UTF-8, with the same line ends on every system."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files into the folder given by --out."""
    parser = argparse.ArgumentParser(description="Write pool.jsonl and target.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made if missing")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("pool.jsonl", make_pool(args.seed)), ("target.jsonl", make_target(args.seed))):
        write_jsonl(args.out / name, rows)
        print(f"{args.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
