"""A page of a dataset's rows as a job with a model would read them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from service.datasets.storage import read_samples
from service.plan.parameters import Parameters
from worker.loading import folders
from worker.loading.folders import ModelFolder
from worker.tasks.process import TaskContext
from worker.text.preview import Renderer

_MAX_CHARACTERS = 2**20  # of the texts of a page: some megabytes of JSON


def run(context: TaskContext, input: dict[str, Any]) -> dict[str, Any]:
    """`rows` is the JSON of `Renderer.row` of each of [start, stop), or of the first of them where the texts are long.

    It is text inside of the result because PostgreSQL's JSON holds no character 0, which a template may write.

    Raises:
        UnitError: the model cannot be used.
    """
    wanted = json.dumps([input["model"], input["parameters"]], sort_keys=True)
    folder, renderer = _renderer(wanted, context.models)
    if not folder.is_current:
        _renderer.cache_clear()
        _, renderer = _renderer(wanted, context.models)
    samples = read_samples(context.store, input["dataset"], range(input["start"], input["stop"]))
    rows = renderer.page(samples, max_characters=_MAX_CHARACTERS)
    by = {"chat_template": renderer.chat_template, "max_length": renderer.max_length}
    return {"rows": json.dumps(rows), "rendered_by": by}


@lru_cache(maxsize=4)
def _renderer(wanted: str, registered: Path) -> tuple[ModelFolder, Renderer]:
    model, parameters = json.loads(wanted)
    folder = folders.find(model, registered, weights=False)
    return folder, Renderer(folder, Parameters(method="random", **parameters))
