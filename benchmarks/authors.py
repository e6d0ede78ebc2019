"""The authors' code compared with ours: their JVP embedding and per-sample gradient on the same samples, alternating.

This repository contains none of their code: `--authors` names a checkout of github.com/IST-DASLab/influence_distillation. Imports
that need CUDA are replaced by stubs, and its random projections are skipped (the JVP's is replaced by an identity, gradients
are kept whole), which favours it, since ours project.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import core_plain as plain
import torch
from core_stages import MODULES, PROJECTION
from torch import Tensor

from worker.influence import EmbeddingOptions, Samples, embed, per_sample_gradients
from worker.influence.causal_lm import first_blocks, hidden_states
from worker.influence.forward_mode import attention_named, forward_mode

# Names that their modules import from packages that may not be installed. None of them is called.
NEEDED = {
    "fast_hadamard_transform": ("hadamard_transform",),
    "trak.projectors": ("BasicProjector", "CudaProjector", "ProjectionType"),
}
RAN = {
    "gradients": "_create_grad_store (calc_grad, normalisation, stacking), projector None",
    "jvp": "create_jvp_store, 4 blocks, 2 tangents, directions only in the blocks' parameters, without its projection",
    "attention": "eager for the JVP (fused attention has no forward-mode derivative here); the model's default for gradients",
}


def measure(model: Any, samples: Samples, options: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """Ratios over all samples except the first; the setup of a call and the first sample are subtracted on both sides."""
    their, stood_in = _their_code(options.authors)
    embedding = EmbeddingOptions(kind="jvp", pooling="last", blocks=min(4, len(model.base_model.layers)))
    pairs: dict[str, tuple[Callable[[Samples], Any], Callable[[Samples], Any]]] = {
        "gradients": (
            lambda part: their.gradients(model, part),
            lambda part: per_sample_gradients(
                model, part, modules=MODULES, projection=PROJECTION, token_budget=options.token_budget
            ),
        ),
        "jvp": (
            lambda part: their.embeddings(model, part, embedding),
            lambda part: embed(model, part, options=embedding, token_budget=options.token_budget),
        ),
    }
    first, rest = samples.slice(0, 1), samples.slice(1, len(samples))
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for _ in range(options.rounds):
        for name, (theirs, ours) in pairs.items():
            spent = _timed(clock, theirs, samples) - _timed(clock, theirs, first)
            rounds[name].append((spent, _timed(clock, ours, rest) - _timed(clock, ours, samples.slice(0, 0))))
    return {
        "commit": _commit(options.authors),
        "ran": RAN,
        "stood_in": stood_in,
        "dtype": str(model.dtype).removeprefix("torch."),
        "samples": len(rest),
        "tokens": int(rest.lengths.sum()),
        "agreement": _agreement(their, model, first, embedding),
        **{name: _ratio(pair) for name, pair in rounds.items()},
    }


def _timed(clock: Callable[[], float], run: Callable[[Samples], Any], part: Samples) -> float:
    start = clock()
    run(part)
    return clock() - start


def _ratio(rounds: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [theirs / ours for theirs, ours in rounds]
    return {
        "their_seconds": [theirs for theirs, _ in rounds],
        "our_seconds": [ours for _, ours in rounds],
        "ratio": statistics.mean(ratios),
        "ratio_sd": statistics.stdev(ratios) if len(ratios) > 1 else None,
    }


def _agreement(their: SimpleNamespace, model: Any, one: Samples, embedding: EmbeddingOptions) -> dict[str, Any]:
    """For the first sample: both unprojected gradients, and both derivatives along the directions that their code drew."""
    gradient = per_sample_gradients(model, one, modules=MODULES, projection=None).values
    theirs, drawn = their.derivatives(model, one, embedding)
    base = first_blocks(model.base_model, embedding.blocks)
    names = [name for name, _ in base.named_parameters() if name.startswith("layers.")]
    directions = {name: torch.stack(parts) for name, *parts in zip(names, *drawn, strict=True)}
    with torch.no_grad(), forward_mode(base, directions):
        ours = hidden_states(model, base, plain.ids_of(one, 0, model.device))[1:, -1]
    return {
        "gradient_cosine": _cosine(gradient[0], their.gradients(model, one)[0]),
        "jvp_cosine": _cosine(ours.flatten(), theirs),
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().cpu(), b.double().cpu(), dim=0))


def _commit(folder: Path) -> str:
    completed = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return completed.stdout.strip()


def _their_code(folder: Path) -> tuple[SimpleNamespace, list[str]]:
    """Their functions that are called, and the names of the modules replaced by stubs."""
    stood_in = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in stood_in:
        package, _, inner = name.partition(".")
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update({needed: type(needed, (), {}) for needed in NEEDED[name]})
        if inner:
            sys.modules[package] = ModuleType(package)
            setattr(sys.modules[package], inner, sys.modules[name])
    sys.path.insert(0, str(folder.resolve()))
    distil, jvp = (importlib.import_module(f"infdist.{name}") for name in ("distil", "jvp"))
    found = SimpleNamespace(
        gradients=lambda model, part: _their_gradients(distil, model, part),
        embeddings=lambda model, part, embedding: _their_embeddings(jvp, model, part, embedding),
        derivatives=lambda model, part, embedding: _their_derivatives(jvp, model, part, embedding),
    )
    return found, stood_in


def _their_gradients(distil: ModuleType, model: Any, part: Samples) -> Tensor:
    """(n, d), each row of unit length."""
    loader = [{name: value[None] for name, value in row.items()} for row in _rows(model, part)]
    with _quiet():
        params = distil._get_params(model, param_subset=MODULES)
        stored: Tensor = distil._create_grad_store(model, loader, params, None, None, None, 1)
    return stored


def _their_embeddings(jvp: ModuleType, model: Any, part: Samples, embedding: EmbeddingOptions) -> list[Tensor]:
    loader = SimpleNamespace(dataset=_rows(model, part))
    with (
        _quiet(),
        attention_named(model.config, "eager"),
        mock.patch.object(jvp, "_cosntruct_projector"),
        mock.patch.object(jvp, "_project_grad", lambda _, parts, **__: torch.cat(parts)),
    ):
        stored: list[Tensor] = jvp.create_jvp_store(
            model,
            loader,
            num_blocks=embedding.blocks,
            num_tangents=embedding.tangents,
            param_regex=r"^model\.layers\.",
        )
    return stored


def _their_derivatives(
    jvp: ModuleType, model: Any, one: Samples, embedding: EmbeddingOptions
) -> tuple[Tensor, list[list[Tensor]]]:
    """For one sample: the concatenated derivatives, and the directions of each in the order of the parameters."""
    drawn: list[Tensor] = []

    def record(like: Tensor) -> Tensor:
        drawn.append(own(like))
        return drawn[-1]

    own = torch.randn_like
    with mock.patch.object(torch, "randn_like", record):
        (derivatives,) = _their_embeddings(jvp, model, one, embedding)
    each = len(drawn) // embedding.tangents
    return derivatives, [drawn[start : start + each] for start in range(0, len(drawn), each)]


def _rows(model: Any, part: Samples) -> list[dict[str, Tensor]]:
    """The samples as their loaders yield them, each (T,)."""
    rows = []
    for i in range(len(part)):
        ids = plain.ids_of(part, i, model.device)[0]
        labels = ids.masked_fill(~plain.marked(part, i, part.response, model.device)[0], -100)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses their progress bars and prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
