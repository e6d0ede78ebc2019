"""What a model makes of a dataset: its tokens, what of them is cut and counted, and the rows that no job could use."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from service.datasets.storage import Sample
from service.models.configs import ADAPTER_CONFIG, CONFIG
from service.models.dependency_check import unsafe_packages
from service.models.registry import resolve
from service.plan.parameters import Parameters
from service.settings import ModelSettings
from worker.check.lengths import Lengths
from worker.errors import ParameterError
from worker.given_options import parameters_of
from worker.loading import folders
from worker.text.preview import Renderer
from worker.text.tokenization import Tokenised, tokenise

_NAMED = 100


class Model:
    """A model's tokenizer and chat template, as the jobs with these parameters use them.

    Args:
        name: a folder, the name of one in the folder of registered models, or owner/name on the hub.
        registered: the folder of registered models.
        settings: parameters of the job, NAME=VALUE.

    Raises:
        ApiError, UnitError: there is no such model, it cannot be used, or a parameter is wrong.
    """

    def __init__(self, name: str, registered: Path, settings: list[str]) -> None:
        if problems := unsafe_packages():
            raise ParameterError("; ".join(problems))
        self.name = name
        self.parameters: Parameters = parameters_of(settings)
        registered, name = _place(name, registered)
        # Nobody else decides what this machine takes from the hub. Nothing is computed, so no size of the model matters.
        found = resolve(ModelSettings(folder=registered, hub=("*/*",)), name, Parameters(method="random"))
        self.renderer = Renderer(folders.find(found, registered, weights=False), self.parameters)

    def counts(self, samples: Iterable[Sample], rows: int, report: Callable[[int], None]) -> dict[str, Any]:
        """The lengths of the samples in tokens, before they are cut (`tokens`), after (`kept_tokens`), and of what is learnt
        (`counted_tokens`); what is cut; and the rows that take no part, by reason, the first hundred by name."""
        ids: dict[int, str] = {}
        found = _Counts()
        by = self.renderer
        how: dict[str, Any] = {"max_length": by.max_length, "rendered": by.rendering, "report": report}
        for row in tokenise(_noting(samples, ids), by.tokenizer, **how):
            found.add(row, ids.pop(row.index))
        unusable = found.reasons.total()
        return {
            "name": self.name,
            "chat_template": by.chat_template,
            "max_length": by.max_length,
            "tokens": found.whole.summary(),
            "kept_tokens": found.kept.summary(),
            "counted_tokens": found.counted.summary(),
            "truncated": found.truncated,
            "truncated_responses": found.truncated_responses,
            "unusable": {"count": unusable, "by_reason": dict(found.reasons.most_common()), "first": found.first},
            "max_unusable": self.parameters.max_unusable,
            "too_many_unusable": unusable > self.parameters.max_unusable * rows,
            "rendering": dict(sorted(found.notes.items())),
        }


def _place(name: str, registered: Path) -> tuple[Path, str]:
    """The folder of models, and the name of the model in it or on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ParameterError(f"--model {name}: no such folder")
        return registered, name
    if not any((folder / file).is_file() for file in (CONFIG, ADAPTER_CONFIG)):
        raise ParameterError(f"--model {name}: a folder without {CONFIG} and {ADAPTER_CONFIG}")
    # The base of an adapter lies beside it, as among the service's registered models.
    return folder.resolve().parent, folder.resolve().name


class _Counts:
    def __init__(self) -> None:
        self.whole, self.kept, self.counted = Lengths(), Lengths(), Lengths()
        self.truncated = self.truncated_responses = 0
        self.reasons: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []
        self.notes: Counter[str] = Counter()

    def add(self, row: Tokenised, id: str) -> None:
        if row.unusable is not None:
            self.reasons[row.unusable] += 1
            if len(self.first) < _NAMED:
                self.first.append({"index": row.index, "id": id, "reason": row.unusable, "detail": row.detail})
            return
        self.whole.add(row.whole)
        self.kept.add(len(row.input_ids))
        self.counted.add(row.predicted)
        self.truncated += row.truncated
        self.truncated_responses += row.response_truncated
        self.notes.update(row.notes)


def _noting(samples: Iterable[Sample], ids: dict[int, str]) -> Iterator[Sample]:
    """The samples, whose ids are noted: tokens come without them, some samples later."""
    for sample in samples:
        ids[sample.index] = sample.id
        yield sample
