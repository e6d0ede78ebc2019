"""A job that computes another one anew: whether it can, and in what its circumstances are others. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from service.jobs.state import Stage
from worker.errors import ModelError
from worker.stages import keys


def differences(record: Mapping[str, Any], prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as the provenance `record` has it, by name, each as {recorded, now}; empty where nothing is.

    Args:
        prepared: the result of the prepare stage of the job that computes anew.

    Raises:
        ModelError: the model's files are others.
    """
    if prepared["model_fingerprint"] != record["model"]["fingerprint"]:
        now, then = prepared["model_files"], record["model"]["files"]
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        raise ModelError(
            "The model's files are not those that the job was computed with, so that it cannot be reproduced:"
            f" {', '.join(changed[:5])} {'differ' if len(changed) > 1 else 'differs'}. Register the model as it was."
        )
    code = {stage: keys.code_version(Stage(stage)) for stage in record["code"] if stage in set(keys.COMPUTED)}
    pairs = {"device": (record["device"], prepared["device"])}
    for kind, then, now in (("versions", record["versions"], prepared["versions"]), ("code", record["code"], code)):
        pairs |= {f"{kind}.{name}": (then.get(name), now.get(name)) for name in sorted(then.keys() | now.keys())}
    return {name: {"recorded": then, "now": now} for name, (then, now) in pairs.items() if then != now}
