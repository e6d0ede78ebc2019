"""What a model makes of single rows: their text, what of it is kept and learnt, and why one takes no part."""

from collections.abc import Iterable
from typing import Any

from service.datasets.storage import Sample
from service.plan.artifact_keys import rendering
from service.plan.parameters import Parameters
from worker.loading import models
from worker.loading.folders import ModelFolder
from worker.text.chat_templates import ChatFormat
from worker.text.templates import Span
from worker.text.tokenization import with_texts


class Renderer:
    """A model's tokenizer and chat template, as jobs with these parameters use them."""

    def __init__(self, folder: ModelFolder, parameters: Parameters) -> None:
        self.tokenizer = models.load_tokenizer(folder)
        self.max_length = min(parameters.max_length, int(models.load_config(folder).max_position_embeddings))
        self.rendering = rendering(parameters.model_dump(mode="json"))
        self._chat = ChatFormat(self.tokenizer, **self.rendering)

    @property
    def chat_template(self) -> str:
        return "default" if self._chat.is_default else "the model's own"

    def row(self, sample: Sample) -> dict[str, Any]:
        """Ready for JSON. Of an unusable sample, `unusable` has {reason, detail} and `tokens` is None; so is `text` where it
        cannot be rendered.

        `spans`: [start, end) in characters of the text, what the loss counts. `kept`: the same of what is left of the text after
        the cut to `max_length`; what the loss counts lies in it. `tokens`: `total` before the cut; `kept` after it, of which the
        loss counts `counted` and the others, `prompt`, are only read.

        Raises:
            ModelError: the chat template is not valid, or takes too long again and again.
        """
        ((rendered, row),) = with_texts([sample], self.tokenizer, self._chat, self.max_length)
        found: dict[str, Any] = {
            "text": None if rendered is None else rendered.text,
            "notes": [] if rendered is None else list(rendered.notes),
            "spans": [],
            "kept": None,
            "tokens": None,
            "truncated": row.truncated,
            "response_truncated": row.response_truncated,
            "unusable": None,
        }
        if row.unusable is not None or rendered is None:
            return {**found, "unusable": {"reason": row.unusable, "detail": row.detail}}
        kept, counted = len(row.input_ids), row.predicted
        return {
            **found,
            "spans": _inside(rendered.spans, row.kept),
            "kept": row.kept,
            "tokens": {"total": row.whole, "kept": kept, "prompt": kept - counted, "counted": counted},
        }

    def page(self, samples: Iterable[Sample], *, max_characters: int) -> list[dict[str, Any]]:
        """`row` of each sample, up to the one with which the texts have `max_characters`."""
        found = []
        characters = 0
        for sample in samples:
            found.append(self.row(sample))
            characters += len(found[-1]["text"] or "")
            if characters >= max_characters:
                break
        return found


def _inside(spans: Iterable[Span], kept: Span) -> list[Span]:
    """The spans as far as they are in what is kept."""
    clipped = ((max(start, kept[0]), min(end, kept[1])) for start, end in spans)
    return [(start, end) for start, end in clipped if start < end]
