"""Tokenise: a dataset's tokens, shard by shard, each by whichever unit comes to it; and what stands for all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from service.datasets import storage
from service.plan.artifact_keys import rendering, tokens_key
from service.plan.shards import prepare_shards
from worker.errors import NAMED_IN_ERROR
from worker.stages import duplicates
from worker.stages.context import StageContext
from worker.text import token_files, tokenization
from worker.text.chat_templates import ChatFormat


@dataclass(frozen=True, kw_only=True)
class DatasetTokens:
    """The tokens of the pool or the target, `dataset` by fingerprint, by the tokenizer of the model with these fingerprints."""

    context: StageContext
    dataset: str
    model: str
    tokenizer: str
    max_length: int

    @property
    def key(self) -> str:
        """Of what stands for all rows."""
        return self._key(None)

    def shard_key(self, rows: tuple[int, int]) -> str:
        return self._key(rows)

    def _key(self, rows: tuple[int, int] | None) -> str:
        job = self.context.job
        return tokens_key(self.dataset, self.tokenizer, self.max_length, job.salt, rendering(job.parameters), rows)

    @cached_property
    def shards(self) -> list[tuple[int, int]]:
        """[start, stop) of each."""
        return prepare_shards(*storage.group_sizes(self.context.store, self.dataset))

    def is_too_large(self) -> bool:
        """Whether it is to be tokenised, and by more than one unit."""
        return not self.is_there() and len(self.shards) > 1

    def is_there(self) -> bool:
        """Whether there is nothing to do; what is damaged is found by who reads it."""
        store = self.context.store
        if not store.is_whole(self.key):
            return False
        return all(store.exists(key) for key in self.parts)

    @property
    def about(self) -> token_files.About:
        return token_files.About.of(self.context.store, self.key)

    @property
    def parts(self) -> list[str]:
        """The keys of the files of rows."""
        return [key for key, _ in self.about.parts]

    def make(self, report: Callable[[int], None]) -> None:
        """Makes what is not there yet: of a dataset of one shard all, of others the shards that were lost, and the whole."""
        store = self.context.store
        if len(self.shards) == 1:
            self.write(self.shards[0], self.key, report)
            return
        for rows in self.shards:
            key = self.shard_key(rows)
            if not (store.exists(key) and store.exists(counts_key(key))):
                self.write(rows, counts_key(key), lambda _: report(0))
        token_files.write_whole(store, self.key, [counts_key(self.shard_key(rows)) for rows in self.shards])

    def write(self, rows: tuple[int, int], counts: str, report: Callable[[int], None]) -> None:
        """Tokenises the rows [start, stop) of the dataset."""
        context, how = self.context, rendering(self.context.job.parameters)
        tokenizer = context.models.tokenizer(context.job.model, self.model)
        tokenised = tokenization.tokenise(
            storage.iter_samples(context.store, self.dataset, *rows),
            tokenizer,
            max_length=self.max_length,
            rendered=how,
            report=report,
        )
        template = "default" if ChatFormat(tokenizer).is_default else "the model's own"
        token_files.write_part(context.store, self.shard_key(rows), counts, tokenised, template)

    def unusable(self, key: str, counts: tokenization.TokenCounts, named: int) -> dict[str, Any]:
        """How many of the rows that the artifact stands for, of these counts, take no part, by reason; and the first of them."""
        store = self.context.store
        by_reason = {reason: len(rows) for reason, rows in counts.unusable.items()}
        first = token_files.About.of(store, key).unusable[:named]
        ids = storage.read_samples(store, self.dataset, [row["index"] for row in first]) if first else []
        return {
            "count": sum(by_reason.values()),
            "by_reason": by_reason,
            "first": [{"id": sample.id, **row} for sample, row in zip(ids, first, strict=True)],
        }


def counts_key(shard: str) -> str:
    """Of what stands for the rows of a shard; used and collected together with them."""
    return f"{shard.removesuffix('.parquet')}.counts.parquet"


def run(context: StageContext, artifact_key: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the tokens of a shard, and beside them what stands for them, which the result names; of one of the pool also the
    signatures of its rows.

    Raises:
        ModelNotHere: the model's files are not those that the job began with.
        ModelError: its tokenizer cannot be loaded.
    """
    rows = spec["start"], spec["stop"]
    dataset = getattr(context.job, spec["dataset"])
    folder = context.models.unchanged(context.job.model, spec["model"])
    tokens = DatasetTokens(
        context=context,
        dataset=dataset,
        model=folder.fingerprint,
        tokenizer=folder.tokenizer_fingerprint,
        max_length=spec["max_length"],
    )
    counts = counts_key(artifact_key)
    tokens.write(rows, counts, context.report)
    unusable = tokens.unusable(counts, token_files.read_counts(context.store, counts), NAMED_IN_ERROR)
    found = {"counts": counts, "of": spec["of"], "unusable": unusable}
    if spec["dataset"] != "pool":
        return found
    return {
        **found,
        "signatures": duplicates.write_signatures(context, rows, lambda: context.report(rows[1] - rows[0])),
    }
