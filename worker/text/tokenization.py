"""From samples to tokens: the tokens of a sample, those that the loss counts, and what was truncated."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from service.datasets.storage import Sample
from worker.errors import UnusableRow
from worker.text.chat_templates import ChatFormat, Rendered
from worker.text.templates import Span

ROW_GROUP = 1024
NO_REPLY = "no_reply"
"""The reason of a row that has no token to learn from; `ChatFormat.render` has others."""
_MAX_DETAIL = 300  # characters: it may quote a template, and is kept by row


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One sample: its place in the dataset, its tokens, int32 (T,), which of them are response, bool (T,), what was cut.

    `whole`: how many tokens it had before. `kept`: [start, end) in characters of its text, what is left of that. `notes`: codes
    of what the rendered text does not say as the sample does. A sample that takes no part in the job has no tokens, but the code
    of a reason, `unusable`, and a `detail` in words.
    """

    index: int
    input_ids: npt.NDArray[np.int32]
    response: npt.NDArray[np.bool_]
    truncated: bool
    response_truncated: bool
    whole: int = 0
    kept: Span = (0, 0)
    notes: tuple[str, ...] = ()
    unusable: str | None = None
    detail: str | None = None

    @property
    def predicted(self) -> int:
        """How many tokens the loss counts: responses that have a token before them."""
        return int(self.response[1:].sum())


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Of every sample of an artifact: tokens, tokens that the loss counts (int64 (n,)), what was cut (bool (n,)).

    `unusable`: of each reason, the rising rows (m,) that take no part; they have no tokens, and no others lack tokens that the
    loss counts. `notes`: in how many rows each was made.
    """

    length: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    response_truncated: npt.NDArray[np.bool_]
    unusable: Mapping[str, npt.NDArray[np.int64]]
    notes: Mapping[str, int]

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """Which rows take part in a job, bool (n,)."""
        return self.predicted > 0

    def summary(self) -> dict[str, int]:
        """The counts that a job reports."""
        return {
            "samples": len(self.length),
            "tokens": int(self.length.sum()),
            "squares": int(np.square(self.length).sum()),
            "response_tokens": int(self.predicted.sum()),
            "longest": int(self.length.max()),
            "truncated": int(self.truncated.sum()),
            "truncated_responses": int(self.response_truncated.sum()),
        }


def tokenise(
    samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    report: Callable[[int], None],
    rendered: Mapping[str, Any] | None = None,
) -> Iterator[Tokenised]:
    """Tokenises in order and cuts to `max_length` tokens; `report` gets the number of samples done. A sample that cannot be
    rendered, or has nothing to learn from, comes without tokens and with the reason. `rendered`: keyword arguments of
    `ChatFormat`."""
    chat = ChatFormat(tokenizer, **(rendered or {}))
    remaining = iter(samples)
    done = 0
    while chunk := list(islice(remaining, ROW_GROUP)):
        for _, row in with_texts(chunk, tokenizer, chat, max_length):
            yield row
        done += len(chunk)
        report(done)


def with_texts(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, max_length: int
) -> Iterator[tuple[Rendered | None, Tokenised]]:
    """The text of each sample, or None where it cannot be rendered, and its tokens."""
    made = [_rendered(chat, sample) for sample in samples]
    encoded = _encoded(tokenizer, [each.text for each in made if isinstance(each, Rendered)])
    for sample, each in zip(samples, made, strict=True):
        if isinstance(each, UnusableRow):
            yield None, _unusable(sample.index, each.reason, each.message)
        else:
            yield each, _cut(sample.index, each, *next(encoded), max_length)


def _rendered(chat: ChatFormat, sample: Sample) -> Rendered | UnusableRow:
    try:
        return chat.render(sample)
    except UnusableRow as row:
        return row


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[tuple[list[int], list[Span]]]:
    """The tokens of each text, and the characters of each token."""
    if texts:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


def _unusable(index: int, reason: str, detail: str) -> Tokenised:
    # It may quote anything of the row or of the template, and is stored, and printed on terminals.
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(detail.split()))
    if len(text) > _MAX_DETAIL:
        text = f"{text[: _MAX_DETAIL - 3]}..."
    nothing = np.empty(0, np.int32), np.empty(0, np.bool_)
    return Tokenised(index, *nothing, truncated=False, response_truncated=False, unusable=reason, detail=text)


def _response_mask(rendered: Rendered, offsets: list[Span]) -> npt.NDArray[np.bool_]:
    """A token belongs to the response if it shares a character with one of the spans."""
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(places), dtype=bool)
    for start, end in rendered.spans:
        mask |= (places[:, 0] < end) & (places[:, 1] > start)
    return mask


def _cut(index: int, rendered: Rendered, ids: list[int], offsets: list[Span], max_length: int) -> Tokenised:
    response = _response_mask(rendered, offsets)
    window = response_window(response, max_length)
    kept = response[window]
    if not kept[1:].any():
        return _unusable(index, NO_REPLY, "it has no token to learn from: its replies are empty")
    return Tokenised(
        index=index,
        input_ids=np.array(ids[window], np.int32),
        response=kept,
        truncated=len(kept) < len(response),
        response_truncated=int(kept.sum()) < int(response.sum()),
        whole=len(response),
        kept=(offsets[window.start][0], offsets[window.stop - 1][1]),
        notes=rendered.notes,
    )


def response_window(response: npt.NDArray[np.bool_], max_length: int) -> slice:
    """The window of at most `max_length` tokens with the most predicted response tokens; the earliest one if several tie.

    So a long prompt loses its beginning, and a response too long for the window loses its end.
    """
    length = len(response)
    if length <= max_length:
        return slice(0, length)
    before = np.concatenate([[0], np.cumsum(response)])
    starts = np.arange(length - max_length + 1)
    kept = before[starts + max_length] - before[starts + 1]  # the first token of a window is predicted by nothing
    start = int(np.argmax(kept))
    return slice(start, start + max_length)
