"""A selection in the log of a training run: an artifact of Weights & Biases, or an input of MLflow."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.answers import Provenance, SelectionResult

if TYPE_CHECKING:
    import pyarrow as pa

_DIGEST_LENGTH = 36  # the most that MLflow keeps


def wandb_run(run: Any) -> Any:
    """The run that was given, or the one that is active.

    Raises:
        ValueError: there is none.
    """
    import wandb

    if (run or wandb.run) is None:
        raise ValueError("run: no run of wandb is active; call wandb.init first, or pass one")
    return run or wandb.run


def log_artifact(run: Any, folder: Path, results: SelectionResult, provenance: Provenance) -> Any:
    """The artifact, of the type dataset, with the files of the folder and what is known of the selection as its metadata."""
    import wandb

    artifact = wandb.Artifact(f"winnow-{results.job_id}", type="dataset", metadata=_facts(results, provenance))
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)
    return artifact


def log_input(table: "pa.Table", source: str, results: SelectionResult, provenance: Provenance, context: str) -> Any:
    """The dataset that the active run of MLflow has as an input from now on; the digest is the beginning of the Merkle root.

    `source`: where it can be downloaded again.
    """
    import mlflow
    from mlflow.data.pandas_dataset import from_pandas

    digest = provenance.weights_root[:_DIGEST_LENGTH]
    dataset = from_pandas(table.to_pandas(), source=source, name=f"winnow-{results.job_id}", digest=digest)
    facts = _facts(results, provenance)
    verdict = facts.pop("verdict")
    tags = {f"winnow.{name}": str(value) for name, value in {**facts, **verdict}.items() if value is not None}
    mlflow.log_input(dataset, context=context, tags=tags)
    return dataset


def _facts(results: SelectionResult, provenance: Provenance) -> dict[str, Any]:
    fidelity = results.fidelity
    return {
        "job_id": results.job_id,
        "weights_root": provenance.weights_root,
        "pool_fingerprint": provenance.record.get("pool", {}).get("fingerprint"),
        "target_fingerprint": provenance.record.get("target", {}).get("fingerprint"),
        "samples": results.sample_count,
        "selected": results.selected_count,
        "mean_spearman": None if fidelity is None else fidelity.mean_spearman,
        "mean_r2": None if fidelity is None else fidelity.mean_r2,
        "verdict": {f"verdict.{each.about}": each.level for each in results.verdict or ()},
    }
