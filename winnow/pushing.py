"""A selection as a dataset repository of the Hugging Face Hub: the samples, a card, and what they are verified against.

Needs huggingface_hub, and the token that `hf auth login` or HF_TOKEN gives it.
"""

import json
from pathlib import Path

from winnow.answers import FidelityFound, Provenance, SelectionResult
from winnow.version import DISTRIBUTION, client_version

DATA = "data/train.parquet"
# Of the audit record, what says how the selection was made. Whose key posted the job and which workers did it stays behind.
_PUBLISHED = (
    *("pool", "target", "model", "budget", "parameters", "seed", "max_length", "dtype", "device", "versions", "code"),
    "selection_sha256",
)
_CARD = """---
tags:
- data-selection
- winnow
configs:
- config_name: default
  data_files:
  - split: train
    path: {data}
---

# {selected:,} samples that Winnow selected

Chosen from a pool of {samples:,} by {method}: those that lower the loss of {model} on a target most. Each has its
`influence`, `weight` and `rank` beside its content.

## Verdict

{verdict}

## Fidelity

{fidelity}

## Provenance

| | |
| --- | --- |
| job | `{job}` |
| pool, target (fingerprints) | `{pool}`, `{target}` |
| model (fingerprint) | {model}, `{model_fingerprint}` |
| budget, seed | {budget}, {seed} |
| Merkle root of all weights | `{root}` |

`winnow verify {data} --provenance provenance.json` checks the file against the record of the job. The samples have
the licence of the pool that they are from.
"""


def describe(folder: Path, results: SelectionResult, provenance: Provenance) -> None:
    """Writes the card, and the part of the audit record that is published, into the folder of a repository."""
    record = {name: provenance.record[name] for name in _PUBLISHED if name in provenance.record}
    published = {"job_id": results.job_id, "weights_root": provenance.weights_root, "record": record}
    (folder / "provenance.json").write_text(json.dumps(published, ensure_ascii=False, indent=2) + "\n")
    (folder / "README.md").write_text(_card(results, provenance))


def upload(folder: Path, repository: str, job_id: str, *, public: bool) -> str:
    """Commits what is in the folder to the dataset repository, which is created if there is none; returns the commit's address.

    Raises:
        ValueError: the repository is public, and that was not asked for.
        OSError: the hub refuses.
    """
    from huggingface_hub import HfApi

    hub = HfApi(library_name=DISTRIBUTION, library_version=client_version())
    hub.create_repo(repository, repo_type="dataset", private=not public, exist_ok=True)
    if not public and not hub.dataset_info(repository).private:
        raise ValueError(
            f"{repository} is there already, and everyone can read it; name another, or say that it is public"
        )
    commit = hub.upload_folder(
        repo_id=repository, repo_type="dataset", folder_path=folder, commit_message=f"Selection of {job_id}"
    )
    return str(commit.commit_url)


def _card(results: SelectionResult, provenance: Provenance) -> str:
    record = provenance.record
    model = record.get("model", {})
    return _CARD.format(
        data=DATA,
        selected=results.selected_count,
        samples=results.sample_count,
        model=_literal(model.get("name") or model.get("id")),
        method=_literal(results.get("method")),
        verdict="\n".join(f"* {each.level}, {each.about}: {_one_line(each.meaning)}" for each in results.verdict or ())
        or "None was made.",
        fidelity=_fidelity(results.fidelity),
        job=results.job_id,
        pool=record.get("pool", {}).get("fingerprint"),
        target=record.get("target", {}).get("fingerprint"),
        model_fingerprint=model.get("fingerprint"),
        budget=record.get("budget"),
        seed=record.get("seed"),
        root=provenance.weights_root,
    )


def _fidelity(found: FidelityFound | None) -> str:
    if found is None:
        return "All influence was computed exactly, or none was propagated."
    figures = [("R²", found.mean_r2), ("Spearman correlation", found.mean_spearman)]
    shown = ", ".join(f"{name} {'unknown' if value is None else f'{value:.3f}'}" for name, value in figures)
    return f"Each exact influence predicted from the others (mean over the target): {shown}."


def _literal(name: str | None) -> str:
    return f"`{_one_line(name or 'unknown').replace('`', '')}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())
