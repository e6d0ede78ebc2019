"""Propagate: every sample's influence on every target, and what is to be computed exactly next.

What is exact stays exact: the rows of landmarks and of what was refined hold their own influence. Where `min_fidelity` is not
met, nothing is propagated yet; the result asks for more landmarks instead. Where a round of refining follows, the result asks for
the gradients of its shortlist, and the influence is propagated again once they are there.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from service.plan.limits import KERNEL_ROWS, MAX_CENTRES, MAX_LANDMARKS
from service.plan.shards import gradient_shards
from service.storage.artifacts import ArtifactStore
from service.storage.tempdirs import temporary_directory
from worker.influence import Fidelity, KernelRidge, cosine_influence, fidelity
from worker.stages.context import StageContext
from worker.stages.exact_rows import (
    Measure,
    check_nonfinite,
    eligible_samples,
    exact_rows,
    exact_shards,
    gradient_keys,
    nonfinite,
    valid_targets,
)
from worker.stages.rounds import Known, next_round
from worker.text import token_files

Blocks = Iterator[tuple[int, npt.NDArray[np.float32]]]
"""(first row, columns (m, x)), rising."""


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes [P | curvature columns], float32 (n, x), as .npy; see `Measure.rows` for the columns. Where it propagates, writes
    beside it what each exact sample contributes, which the result names as `explanation`. Where the result asks for more
    landmarks (`grow`) or exact gradients (`shortlist`), writes neither."""
    store, job = context.store, context.job
    _check_all(context, spec)
    with temporary_directory(store.temporary_folder) as folder:
        influence = folder / "influence.npy"
        if job.parameters["method"] == "rds_plus":
            targets = torch.cat(list(_embedding_shards(store, spec["target_embeddings"]))).float()
            _write(context, influence, len(targets), _cosines(store, spec["embeddings"], targets))
            found: dict[str, Any] = {"fidelity": None, "notes": []}
        elif not spec["embeddings"] or _count(spec, context) == context.prepared["usable"]:
            measure = Measure.load(context, spec)
            _write(context, influence, measure.columns, _exact_blocks(store, measure, spec["landmarks"]))
            found = {"fidelity": None, "notes": _notes_of_growth(context, spec, None)}
        else:
            found = _propagate(context, artifact_key, spec, influence)
        if not (found.get("grow") or found.get("shortlist")):
            with store.writing(artifact_key) as path:
                shutil.move(influence, path)
    return {"shortlist": None, **found}


def _propagate(context: StageContext, artifact_key: str, spec: dict[str, Any], influence: Path) -> dict[str, Any]:
    measure = Measure.load(context, spec)
    exact, P_ex = exact_rows(context.store, measure, [*spec["landmarks"], *spec["refined"]])
    landmarks = [token_files.read_indices(context.store, round_["tokens"]) for round_ in spec["landmarks"]]
    is_landmark = np.isin(exact, np.concatenate(landmarks))
    ridge = _fit(context, spec, exact, P_ex)
    valid = valid_targets(context, spec["target_gradients"])
    left_out_et = ridge.leave_one_out()[:, valid]
    found = fidelity(P_ex[is_landmark][:, valid], left_out_et[is_landmark])
    if not spec["refined"]:
        grow = _growth(context, _count(spec, context), spec["most_refined"], found)
        if grow is not None:
            return {"grow": grow, "fidelity": _as_dict(found), "notes": []}
    blocks = _predictions(context.store, spec["embeddings"], ridge, exact, P_ex)
    _write(context, influence, measure.columns, blocks)
    keys = [*spec["embeddings"], *gradient_keys(spec["landmarks"]), *gradient_keys(spec["refined"])]
    known = Known(
        P_nx=np.load(influence, mmap_mode="r"),
        valid=valid,
        eligible=eligible_samples(context, keys),
        exact=exact,
        is_landmark=is_landmark,
        P_et=P_ex[:, valid].double().numpy(),
        left_out_et=left_out_et.double().numpy(),
        tried=_rows_of(context, spec["refined"]),
        most=spec["most_refined"],
    )
    refinement, shortlist = next_round(context, known, influence.parent)
    explanation = None
    if shortlist is None:
        left_out = exact[is_landmark], left_out_et[is_landmark].mean(dim=1)
        explanation = _write_explanation(context, artifact_key, ridge, exact, valid, left_out)
    return {
        "shortlist": shortlist,
        "refinement": refinement,
        "explanation": explanation,
        "fidelity": _as_dict(found),
        "kernel": ridge.kernel,
        "sigma": ridge.sigma,
        "delta": ridge.delta,
        "operations": 2.0 * context.prepared["n"] * len(ridge.centres) * (ridge.E_ze.shape[1] + measure.columns),
        "notes": [] if spec["refined"] else _notes_of_growth(context, spec, found),
    }


def _rows_of(context: StageContext, rounds: Sequence[dict[str, Any]]) -> int:
    return sum(len(token_files.read_indices(context.store, round_["tokens"])) for round_ in rounds)


def _count(spec: dict[str, Any], context: StageContext) -> int:
    return _rows_of(context, spec["landmarks"])


def _check_all(context: StageContext, spec: dict[str, Any]) -> None:
    """Each unit has checked its own share of the samples that are not finite; this checks them all together."""
    store, prepared = context.store, context.prepared
    of_targets = nonfinite(store, [*spec["target_gradients"], *spec["target_embeddings"]])
    check_nonfinite(context, context.job.target, of_targets, prepared["t"], "target samples")
    of_landmarks = nonfinite(store, gradient_keys(spec["landmarks"]))
    check_nonfinite(context, context.job.pool, of_landmarks, _count(spec, context), "landmarks")
    of_refined = nonfinite(store, gradient_keys(spec["refined"]))
    check_nonfinite(context, context.job.pool, of_refined, _rows_of(context, spec["refined"]), "shortlisted samples")
    check_nonfinite(context, context.job.pool, nonfinite(store, spec["embeddings"]), prepared["n"], "samples")


def _fit(
    context: StageContext, spec: dict[str, Any], landmarks: npt.NDArray[np.int64], P_lx: torch.Tensor
) -> KernelRidge:
    kernel = context.job.parameters["kernel"]
    embeddings = landmark_embeddings(context.store, spec["embeddings"], landmarks)
    return KernelRidge.fit(
        embeddings,
        P_lx,
        kernel=kernel["kind"],
        ridge=kernel["ridge"],
        bandwidth=kernel["bandwidth"],
        targets=context.prepared["t"],
        centres=MAX_CENTRES,
    )


def landmark_embeddings(store: ArtifactStore, shards: Sequence[str], rows: npt.NDArray[np.int64]) -> torch.Tensor:
    """The embeddings of the rising `rows`, float32 (l, e), gathered shard by shard."""
    parts, start = [], 0
    for E_me in _embedding_shards(store, shards):
        inside = rows[(rows >= start) & (rows < start + len(E_me))] - start
        parts.append(E_me[torch.from_numpy(inside)].float())
        start += len(E_me)
    return torch.cat(parts)


def _embedding_shards(store: ArtifactStore, shards: Sequence[str]) -> Iterator[torch.Tensor]:
    for key in shards:
        with store.local(key) as path, safe_open(path, framework="pt") as file:
            yield file.get_tensor("embeddings")


def _predictions(
    store: ArtifactStore,
    shards: Sequence[str],
    ridge: KernelRidge,
    landmarks: npt.NDArray[np.int64],
    P_lx: torch.Tensor,
) -> Blocks:
    start = 0
    for shard in _embedding_shards(store, shards):
        for E_me in shard.split(KERNEL_ROWS):
            P_mx = ridge.predict(E_me.float()).float().numpy()
            inside = (landmarks >= start) & (landmarks < start + len(P_mx))
            P_mx[landmarks[inside] - start] = P_lx[torch.from_numpy(inside)].numpy()
            yield start, P_mx
            start += len(E_me)


def _cosines(store: ArtifactStore, shards: Sequence[str], targets: torch.Tensor) -> Blocks:
    start = 0
    for shard in _embedding_shards(store, shards):
        for E_me in shard.split(KERNEL_ROWS):
            yield start, cosine_influence(E_me.float(), targets).numpy()
            start += len(E_me)


def _exact_blocks(store: ArtifactStore, measure: Measure, rounds: Sequence[dict[str, Any]]) -> Blocks:
    """Where all usable samples are landmarks. Those of several rounds lie across each other, so they are gathered first."""
    shards = exact_shards(store, measure, rounds) if len(rounds) == 1 else iter([exact_rows(store, measure, rounds)])
    for rows, P_mx in shards:
        if not len(rows):
            continue
        block = np.zeros((rows[-1] + 1 - rows[0], P_mx.shape[1]), dtype=np.float32)
        block[rows - rows[0]] = P_mx.numpy()
        yield int(rows[0]), block


def _write(context: StageContext, path: Path, columns: int, blocks: Blocks) -> None:
    """Writes the blocks one after the other; rows that no block has are 0."""
    total = context.prepared["n"]
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (total, columns)}
        np.lib.format.write_array_header_1_0(file, header)
        first = file.tell()
        for start, block in blocks:
            file.seek(first + start * columns * 4)
            file.write(np.ascontiguousarray(block, dtype="<f4").data)
            context.report(start + len(block))
        file.truncate(first + total * columns * 4)


def _write_explanation(
    context: StageContext,
    artifact_key: str,
    ridge: KernelRidge,
    landmarks: npt.NDArray[np.int64],
    valid: npt.NDArray[np.int64],
    left_out: tuple[npt.NDArray[np.int64], torch.Tensor],
) -> str:
    """What a sample's influence is taken apart with: `index` (z,) of the landmarks that span the fit, their `embeddings`, float16
    (z, e); and in rows, of the mean over the valid targets and then of every target, `coefficients`, float64, and `influence`,
    float32 (1 + t, z). And of all `landmarks`, int64 (l,), the mean influence on those targets that is predicted from the others
    (`left_out`, float32 (l,))."""

    def by_target(values_lx: torch.Tensor) -> torch.Tensor:
        values_tl = values_lx[:, : context.prepared["t"]].T
        return torch.cat([values_tl[valid].mean(dim=0, keepdim=True), values_tl])

    tensors = {
        "index": torch.from_numpy(landmarks)[ridge.centres],
        "embeddings": ridge.E_ze.to(torch.float16),  # what they were kept in: nothing is lost
        "coefficients": by_target(ridge.coefficients_zt),
        "influence": by_target(ridge.P_lt[ridge.centres]).float(),
        "landmarks": torch.from_numpy(left_out[0]),
        "left_out": left_out[1].float(),
    }
    key = f"{artifact_key}.landmarks.safetensors"  # used and collected together with the artifact
    with context.store.writing(key) as path:
        save_file(tensors, path)
    return key


def _growth(context: StageContext, count: int, most_refined: int, found: Fidelity) -> dict[str, Any] | None:
    """The next landmarks where `min_fidelity` is not reached: twice as many, or all where exact gradients cost no more."""
    wanted, prepared = context.job.parameters["min_fidelity"], context.prepared
    if wanted is None or found.mean_spearman is None or found.mean_spearman >= wanted:
        return None
    usable = prepared["usable"]
    count_after = min(2 * count, usable)
    if count_after + most_refined >= usable:
        count_after = usable
    elif count_after > MAX_LANDMARKS:
        return None
    with context.store.local(prepared["landmark_order"]) as path:
        order = np.load(path, mmap_mode="r")
    rows = np.sort(order[count:count_after])
    tokens = token_files.rows_artifact(context.store, prepared["pool_tokens"], rows)
    lengths = token_files.read_counts(context.store, tokens).length
    return {"tokens": tokens, "shards": gradient_shards(lengths), "count": count_after}


def _notes_of_growth(context: StageContext, spec: dict[str, Any], found: Fidelity | None) -> list[str]:
    wanted, count = context.job.parameters["min_fidelity"], _count(spec, context)
    if wanted is None:
        return []
    if found is None:
        return [
            f"min_fidelity {wanted}: exact gradients of all {count} usable samples cost no more than the landmarks needed."
        ]
    if found.mean_spearman is None:
        return [f"min_fidelity {wanted} does not apply: every landmark has the same influence."]
    if found.mean_spearman >= wanted:
        return [f"min_fidelity {wanted} is reached with {count} landmarks (Spearman {found.mean_spearman:.3f})."]
    return [
        f"min_fidelity {wanted} is not reached with {count} landmarks (Spearman {found.mean_spearman:.3f}), and no more than"
        f" {MAX_LANDMARKS} are used; method exact_influence computes every sample."
    ]


def _as_dict(found: Fidelity) -> dict[str, Any]:
    return {
        "mean_r2": found.mean_r2,
        "mean_spearman": found.mean_spearman,
        "r2": list(found.r2),
        "spearman": list(found.spearman),
    }
