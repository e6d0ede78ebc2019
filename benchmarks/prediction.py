"""Does the expansion that determines the weights predict the effect of an optimiser step on the target loss?

    python benchmarks/prediction.py --corpus DIR --model DIR --cache DIR --out DIR

A model is warmed up on a few rows of the pool; then SGD and AdamW steps are taken on weighted means of the gradients of other
rows, and the change of the mean target loss is measured and predicted, to first order and to second order with each curvature.
Half of the weightings are random, half are what the selections choose for and against the targets. Curvature is measured along
every row's gradient, so that each quadratic form is exact on every weighting. It is compared with the form of `--rank` directions
and projected gradients that a job uses, and with two rescaled Fisher forms: one counts each target as often as it has response
tokens, the other scales by the Hessian along the step on equal weights. AdamW's step is measured as it is and with its second
moment held, as the prediction assumes. Measurements are kept in the cache, so that an interrupted run can resume.

Shape suffixes: n rows of the pool, t targets, m weightings, r learning rates, k projected values, O and I layer output and input.
"""

import argparse
import hashlib
import json
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from corpus import Corpus, cached, common_arguments, load_model, load_tokenizer, model_folder, samples_of
from measuring import heading
from prediction_findings import Expansion, Measured, figure, findings, noise_of, tables
from reporting import save_plot, write_json
from torch import Tensor

from worker.influence import (
    GradientProjection,
    OptimizerOptions,
    OptimizerState,
    curvature_products,
    default_token_budget,
    directional_derivatives,
    first_order_weights,
    gradient_scaling,
    low_rank,
    mean_one_over_selected,
    offset_influence,
    optimizer_step,
    per_sample_gradients,
    quadratic_factors,
    round_robin,
    sample_losses,
    state_of,
    step_offset,
    stepped,
    top_k,
    weighted_selection,
)
from worker.influence.causal_lm import linear_layers
from worker.loading.adapters import trainable
from worker.training import Training, train

Array = npt.NDArray[np.float64]
MODULES = "down_proj"
PROJECTION_DIM = 8192
AT_ONCE = 8
"""Number of weightings in one piece of the cache, and of directions in one curvature product: so many gradients are in memory in
addition to those of the rows."""
OPTIMIZERS = {"sgd": OptimizerOptions(type="sgd"), "adamw": OptimizerOptions(type="adamw", weight_decay=0.01)}
DEFAULT_RATES = {"sgd": 1e-3, "adamw": 2e-5}
"""The defaults of a job."""
CURVATURES = ("fisher", "ggn", "hessian")


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    setup = Setup(options)
    found = {name: run(setup, name) for name in OPTIMIZERS}
    if options.out is not None:
        report(options, setup, found)


def arguments() -> argparse.Namespace:
    parser = common_arguments(__doc__, rows=20, targets=["gsm8k", "bbh"])
    parser.set_defaults(max_length=96)
    parser.add_argument("--target-rows", type=int, default=2, help="rows of each target, the shortest of its dev split")
    parser.add_argument("--target-length", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=128, help="rows that the model is trained on first")
    parser.add_argument("--warmup-batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8, help="of the quadratic form as a job has it")
    parser.add_argument("--weightings", type=int, default=200, help="half random, half selected")
    parser.add_argument("--few", type=int, default=12, help="number of weightings measured at every rate")
    parser.add_argument(
        "--held", type=int, default=64, help="number of weightings measured with the second moment held as well"
    )
    sgd, adamw = [1e-5, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], [2e-6, 2e-5, 2e-4, 6e-4, 2e-3, 6e-3]
    parser.add_argument("--sgd-rates", type=float, nargs="+", default=sgd, help="the first determines the noise")
    parser.add_argument("--sgd-wide", type=float, nargs="+", default=[1e-3, 1e-2], help="rates of all weightings")
    parser.add_argument("--adamw-rates", type=float, nargs="+", default=adamw)
    parser.add_argument("--adamw-wide", type=float, nargs="+", default=[2e-5, 2e-3])
    return parser.parse_args()


class Setup:
    """The rows, the warmed-up model and the rows' gradients, each computed when first needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = model_folder(options)
        corpus, tokenizer = Corpus(options.corpus), load_tokenizer(self.folder)
        drawn = samples_of(corpus.pool(options.rows + options.warmup, options.seed), tokenizer, options.max_length)
        usable = np.flatnonzero(drawn.predicted() > 0)
        self.pool, self.training = drawn.take(usable[: options.rows]), drawn.take(usable[options.rows :])
        targets = []
        for name in options.targets:
            rows = corpus.target(name, "dev")
            lengths = samples_of(rows, tokenizer, options.max_length * 100).lengths
            targets += [rows[i] for i in np.argsort(lengths, kind="stable")[: options.target_rows]]
        self.targets = samples_of(targets, tokenizer, options.target_length)
        names = ("seed", "rows", "targets", "target_rows", "max_length", "target_length", "warmup", "warmup_batch")
        made_of = {"model": self.folder.name, **{name: getattr(options, name) for name in names}}
        self.cache: Path = options.cache / "prediction" / digest(json.dumps(made_of).encode())

    @cached_property
    def _warmed_up(self) -> tuple[Any, OptimizerState, list[float]]:
        model = load_model(self.folder, torch.float32, self.options.device)
        tensors, _ = cached(self.cache / "warmup.safetensors", lambda: self._train(model))
        parts: dict[str, dict[str, Tensor]] = {"weight": {}, "first": {}, "second": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if name:
                parts[part][name] = tensor
        model.load_state_dict(parts["weight"], strict=False)
        model.requires_grad_(False)
        state = OptimizerState(step=len(tensors["losses"]), first=parts["first"], second=parts["second"])
        return model, state, tensors["losses"].tolist()

    def _train(self, model: Any) -> dict[str, Tensor]:
        training = Training(
            epochs=1,
            learning_rate=DEFAULT_RATES["adamw"],
            batch_size=self.options.warmup_batch,
            optimizer=OPTIMIZERS["adamw"],
            seed=self.options.seed,
            token_budget=default_token_budget(torch.device(self.options.device)),
        )
        optimizer, losses = train(
            model, trainable(model), self.training, training, report=lambda *_: None, progress=lambda *_: None
        )
        state = state_of(optimizer, model)
        tensors = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        for part, moments in (("first", state.first), ("second", state.second)):
            tensors |= {f"{part}.{name}": value for name, value in moments.items() if MODULES in name}
        return {**tensors, "losses": torch.tensor(losses, dtype=torch.float64)}

    @property
    def model(self) -> Any:
        return self._warmed_up[0]

    @property
    def state(self) -> OptimizerState:
        return self._warmed_up[1]

    @property
    def training_losses(self) -> list[float]:
        return self._warmed_up[2]

    @cached_property
    def loss_before(self) -> float:
        return float(sample_losses(self.model, self.targets).double().mean())

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """(n, O, I) by layer, unprojected and unscaled."""
        return by_layer(self.model, per_sample_gradients(self.model, self.pool, projection=None).values)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def by_layer(model: Any, values_nk: Tensor) -> dict[str, Tensor]:
    """Unprojected gradients in the layout of `per_sample_gradients`, as views (n, O, I) by layer."""
    shapes = {name: module.weight.shape for name, module in linear_layers(model, MODULES).items()}
    parts = values_nk.split([shape.numel() for shape in shapes.values()], dim=1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def expansion(setup: Setup, name: str) -> Expansion:
    """The terms of the optimiser's expansion, from the cache if it has them."""
    base, _ = cached(setup.cache / f"{name}.first.safetensors", lambda: first_terms(setup, name))
    P_nt, Gb_t, n = base["P_nt"], base["Gb_t"], len(base["P_nt"])
    found = Expansion(P_nt=P_nt.numpy(), drift=float(Gb_t.mean()))
    found.factors["fisher"] = as_arrays(quadratic_factors("fisher", n=n, P_nt=P_nt))
    found.offset["fisher"] = offset_influence("fisher", P_nt=P_nt, Gb_t=Gb_t).numpy(), mean_square(Gb_t)
    # The gradient of a mean over R tokens is about √R times shorter than a token's, so its square lacks a factor of up to R.
    root_t = torch.from_numpy(setup.targets.predicted()).double().sqrt()
    P_nt, Gb_t = P_nt * root_t, Gb_t * root_t
    found.factors["fisher by tokens"] = as_arrays(quadratic_factors("fisher", n=n, P_nt=P_nt))
    by_tokens = offset_influence("fisher", P_nt=P_nt, Gb_t=Gb_t)
    found.offset["fisher by tokens"] = by_tokens.numpy(), mean_square(Gb_t)
    U_nr, V_rk = low_rank(base["G_nk"], setup.options.rank, seed=setup.options.seed)
    B_nr = base["G_nk"].double() @ V_rk.double().T
    for kind in ("ggn", "hessian"):
        terms, _ = cached(setup.cache / f"{name}.{kind}.safetensors", lambda kind=kind: second_terms(setup, name, kind))
        M_nn, few = terms["M_nn"], f"{kind}, rank {U_nr.shape[1]}"
        exact = quadratic_factors(kind, n=n, B_nr=torch.eye(n), M_rr=M_nn)
        # M is bilinear in the coefficients: these are the terms that a job computes with the coefficients U.
        short = quadratic_factors(kind, n=n, B_nr=B_nr, M_rr=U_nr.T @ M_nn @ U_nr)
        found.factors.update({kind: as_arrays(exact), few: as_arrays(short)})
        found.offset[kind] = found.offset[few] = terms["offset_n"].numpy(), float(terms["bend"])
    # A job would need only one product for the curvature along the step on equal weights.
    uniform_1n = np.ones((1, n))
    times = float(found.second("hessian", uniform_1n, 1.0)[0] / found.second("fisher", uniform_1n, 1.0)[0])
    (B_nt, M_tt), (offset_n, bend) = found.factors["fisher"], found.offset["fisher"]
    found.factors["fisher by one product"] = B_nt, M_tt * times
    found.offset["fisher by one product"] = offset_n * times, bend * times
    return found


def mean_square(values: Tensor) -> float:
    return float(values.square().mean())


def as_arrays(factors: tuple[Tensor, Tensor]) -> tuple[Array, Array]:
    return factors[0].numpy(), factors[1].numpy()


def first_terms(setup: Setup, name: str) -> dict[str, Tensor]:
    """P (n, t), the targets' derivatives along b (t,), and the projected scaled gradients (n, k)."""
    model, settings = setup.model, OPTIMIZERS[name]
    scaling = gradient_scaling(model, MODULES, settings, setup.state)
    of_targets = per_sample_gradients(model, setup.targets, projection=None, scaling=scaling).values
    P_nt = torch.zeros(len(setup.pool), len(setup.targets), dtype=torch.float64)
    for layer, G_tOI in by_layer(model, of_targets).items():
        P_nt += setup.gradients[layer].flatten(1) @ G_tOI.flatten(1).T
    Gb_t = torch.zeros(len(setup.targets), dtype=torch.float64)
    offset = step_offset(model, MODULES, settings, setup.state)
    if offset is not None:
        along = {layer: b_OI[None] for layer, b_OI in offset.items()}
        Gb_t = directional_derivatives(model, setup.targets, along)[:, 0].double()
    projection = GradientProjection(dim=PROJECTION_DIM, seed=setup.options.seed)
    G_nk = per_sample_gradients(model, setup.pool, projection=projection, scaling=scaling).values
    return {"P_nt": P_nt, "Gb_t": Gb_t, "G_nk": G_nk}


def second_terms(setup: Setup, name: str, kind: Any) -> dict[str, Tensor]:
    """For every pair of rows v_iᵀ H v_j (n, n), where v are the scaled gradients; for the offset b, G D_a H b (n,) and bᵀ H b."""
    model, settings, n = setup.model, OPTIMIZERS[name], len(setup.pool)
    scaling = gradient_scaling(model, MODULES, settings, setup.state)
    offset = step_offset(model, MODULES, settings, setup.state)

    def scaled(layers: dict[str, Tensor]) -> dict[str, Tensor]:
        return layers if scaling is None else {layer: scaling.times(layer, value) for layer, value in layers.items()}

    def with_rows(Hv: dict[str, Tensor]) -> Tensor:
        parts = [setup.gradients[layer].flatten(1) @ value.flatten(1).T for layer, value in scaled(Hv).items()]
        return torch.stack(parts).sum(dim=0, dtype=torch.float64)

    M_nn = torch.zeros(n, n, dtype=torch.float64)
    for start in range(0, n, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        directions = scaled({layer: G_nOI[part] for layer, G_nOI in setup.gradients.items()})
        M_nn[:, part] = with_rows(curvature_products(model, setup.targets, directions, kind=kind, modules=MODULES))
    offset_n, bend = torch.zeros(n, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if offset is not None:
        along = {layer: b_OI[None] for layer, b_OI in offset.items()}
        Hb = curvature_products(model, setup.targets, along, kind=kind, modules=MODULES)
        offset_n = with_rows(Hb)[:, 0]
        bend = torch.stack([(Hb[layer] * b_1OI).sum(dtype=torch.float64) for layer, b_1OI in along.items()]).sum()
    return {"M_nn": (M_nn + M_nn.T) / 2, "offset_n": offset_n, "bend": bend}


def random_weightings(n: int, count: int, generator: np.random.Generator) -> Array:
    """(count, n), each with sum n: alternating uniform subsets of any size and exponential weights."""
    W_mn = np.zeros((count, n))
    for i, w_n in enumerate(W_mn):
        if i % 2:
            w_n[:] = generator.exponential(size=n)
        else:
            w_n[generator.choice(n, size=generator.integers(1, n), replace=False)] = 1.0
    return W_mn * (n / W_mn.sum(axis=1, keepdims=True))


def selected_weightings(setup: Setup, terms: Expansion, rates: list[float], count: int) -> Array:
    """(count, n), each with sum n: what the selections choose for and against the targets, all or half of them."""
    n, t = terms.P_nt.shape
    budgets = sorted({max(round(n * share), 1) for share in (0.08, 0.12, 0.2, 0.3, 0.5)})
    halves = (slice(0, t), slice(0, t // 2), slice(t // 2, t)) if t > 1 else (slice(0, t),)
    found: dict[bytes, Array] = {}
    for budget, half, sign in product(budgets, halves, (1.0, -1.0)):
        P_nt = sign * terms.P_nt[:, half]
        p_n = P_nt.mean(axis=1)
        chosen = [equal(n, top_k(p_n, budget)), equal(n, round_robin(P_nt, budget, seed=setup.options.seed))]
        chosen.append(first_order_weights(p_n, budget).weights)
        for kind, rate in product(CURVATURES, rates):
            drifted_n = p_n - sign * rate * terms.offset[kind][0]
            solution = weighted_selection(drifted_n, budget=budget, factors=terms.factors[kind], learning_rate=rate)
            chosen.append(mean_one_over_selected(solution.weights) * n / solution.support)
        found |= {w_n.round(4).tobytes(): w_n for w_n in chosen}
    if len(found) < count:
        raise SystemExit(f"--weightings: the selections choose only {len(found)} different weightings")
    return np.stack(list(found.values()))[
        np.random.default_rng([setup.options.seed, 0x5E1]).permutation(len(found))[:count]
    ]


def equal(n: int, chosen: npt.NDArray[np.int64]) -> Array:
    w_n = np.zeros(n)
    w_n[chosen] = n / len(chosen)
    return w_n


def weightings(setup: Setup, name: str, terms: Expansion) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Alternating random and selected weightings (m, n), and which are selected (m,); a prefix is independent of their number."""
    options, half = setup.options, setup.options.weightings // 2
    random = random_weightings(len(terms.P_nt), half, np.random.default_rng([options.seed, 0x9ED]))
    selected = selected_weightings(setup, terms, getattr(options, f"{name}_wide"), half)
    W_mn = np.stack([random, selected], axis=1).reshape(2 * half, -1)
    return W_mn, np.arange(2 * half) % 2 == 1


def run(setup: Setup, name: str) -> Measured:
    options = setup.options
    rates, wide = getattr(options, f"{name}_rates"), getattr(options, f"{name}_wide")
    terms = expansion(setup, name)
    W_mn, selected_m = weightings(setup, name, terms)
    pieces = []
    for start in range(0, len(W_mn), AT_ONCE):
        part = W_mn[start : start + AT_ONCE]
        place_m1 = np.arange(start, start + len(part))[:, None]
        taken = {"true": (place_m1 < options.few) | np.isin(rates, wide)}
        if OPTIMIZERS[name].is_adam:
            taken["held"] = taken["true"] & (place_m1 < options.held)
        key = digest(part.tobytes() + b"".join(mask.tobytes() for mask in taken.values()) + json.dumps(rates).encode())
        made = partial(steps, setup, name, part, rates, taken)
        pieces.append(cached(setup.cache / f"{name}.steps.{key}.safetensors", made)[0])
        print(f"{name}: {start + len(part)} of {len(W_mn)} weightings", flush=True)
    changes = {step: np.concatenate([piece[step].numpy() for piece in pieces]) for step in taken}
    return Measured(terms=terms, rates=rates, W_mn=W_mn, selected=selected_m, changes=changes)


def steps(
    setup: Setup, name: str, W_mn: Array, rates: list[float], taken: dict[str, npt.NDArray[np.bool_]]
) -> dict[str, Tensor]:
    """The change of the mean target loss (m, r) after the optimiser's true step and after one with Adam's second moment held,
    where `taken` says so; NaN elsewhere."""
    model, settings = setup.model, replace(OPTIMIZERS[name], learning_rate=1.0)
    shares = torch.from_numpy(W_mn / W_mn.shape[1]).float()
    means = {layer: torch.einsum("mn,noi->moi", shares, G_nOI) for layer, G_nOI in setup.gradients.items()}
    changes = {step: torch.full(mask.shape, torch.nan, dtype=torch.float64) for step, mask in taken.items()}
    for i, (step, mask_mr) in product(range(len(W_mn)), taken.items()):
        if not mask_mr[i].any():
            continue
        mean = {layer: mean_mOI[i] for layer, mean_mOI in means.items()}
        unit = optimizer_step(model, MODULES, settings, setup.state, mean, frozen_second=step == "held")
        for j in np.flatnonzero(mask_mr[i]):  # a step is linear in its rate
            with stepped(model, {layer: rates[j] * value_OI for layer, value_OI in unit.items()}, MODULES):
                after = float(sample_losses(model, setup.targets).double().mean())
            changes[step][i, j] = after - setup.loss_before
    return changes


def report(options: argparse.Namespace, setup: Setup, found: dict[str, Measured]) -> None:
    noise = {name: noise_of(measured) for name, measured in found.items()}
    lines = {name: findings(measured, noise[name], options.seed) for name, measured in found.items()}
    result = {
        **heading(options),
        "model": setup.folder.name,
        "pool_rows": len(setup.pool),
        "pool_tokens": int(setup.pool.lengths.sum()),
        "targets": {"names": options.targets, "rows": len(setup.targets), "tokens": int(setup.targets.lengths.sum())},
        "warmup": {"steps": len(setup.training_losses), "losses": setup.training_losses},
        "loss_before": setup.loss_before,
        "weightings": {name: {"all": len(m.W_mn), "selected": int(m.selected.sum())} for name, m in found.items()},
        "default_rates": DEFAULT_RATES,
        "noise": noise,
        "lines": lines,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "prediction.json", result)
    (options.out / "prediction.md").write_text(tables(lines, noise, DEFAULT_RATES))
    save_plot(figure(found, lines, DEFAULT_RATES), options.out / "prediction.svg")


if __name__ == "__main__":
    main()
