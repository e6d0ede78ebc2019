"""Models a job may name: what is registered, and what a hub says."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from pydantic import ValidationError
from support.hub import COMMIT, Hub

from service.http.errors import ApiError, Unavailable, Unprocessable
from service.models.registry import MODEL_TYPES, HubModel, RegisteredModel, registered, resolve
from service.plan.parameters import Parameters
from service.settings import ModelSettings


def register(folder: Path, name: str, config: Any) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


@pytest.fixture
def settings(tmp_path: Path) -> ModelSettings:
    register(tmp_path, "small", {"model_type": "llama", "num_hidden_layers": 30})
    register(tmp_path, "gpt", {"model_type": "gpt2", "n_layer": 12})
    register(tmp_path, "bert", {"model_type": "bert", "num_hidden_layers": 12})
    return ModelSettings(folder=tmp_path, hub=("org/*", "a/*"))


def blocks(count: int) -> Parameters:
    return Parameters(embedding={"kind": "hidden", "blocks": count})  # type: ignore[arg-type]


def refusal(settings: ModelSettings, model: str | HubModel, kind: type[ApiError] = Unprocessable, **given: Any) -> Any:
    with pytest.raises(kind) as caught:
        resolve(settings, model, Parameters(**given))
    return caught.value


# Registered


def test_the_registered_models_are_listed_by_name_with_their_blocks(settings: ModelSettings) -> None:
    bert, *usable = registered(settings)
    assert (bert.name, bert.model_type, bert.blocks) == ("bert", "bert", 12)
    assert "'bert'" in str(bert.problem)
    assert usable == [
        RegisteredModel(name="gpt", model_type="gpt2", blocks=12),
        RegisteredModel(name="small", model_type="llama", blocks=30),
    ]


def problems(settings: ModelSettings) -> dict[str, str]:
    return {model.name: model.problem for model in registered(settings) if model.problem is not None}


def test_a_link_that_leads_out_of_the_folder_is_no_model(settings: ModelSettings, tmp_path: Path) -> None:
    inner = tmp_path / "models"
    register(inner, "inside", {"model_type": "llama", "num_hidden_layers": 30})
    (inner / "outside").symlink_to(tmp_path / "small")
    (inner / "alias").symlink_to(inner / "inside")
    settings = ModelSettings(folder=inner)
    assert [model.name for model in registered(settings)] == ["alias", "inside", "outside"]
    assert list(problems(settings)) == ["outside"]
    assert refusal(settings, "outside").param == "model"


def is_alone(settings: ModelSettings, name: str) -> None:
    """The model of that name cannot be used, is listed with a reason that holds no path, and hides no other."""
    found = problems(settings)
    assert set(found) == {"bert", name}
    assert str(settings.folder) not in found[name]
    assert len(found[name]) < 300
    assert resolve(settings, "small", Parameters()) == {"kind": "registered", "name": "small"}
    error = refusal(settings, name)
    assert error.param == "model"
    assert found[name] in error.detail


@pytest.mark.parametrize(
    "config",
    [
        *("{", "[]", "[" * 100_000, "null", "\0", "", "x" * (2**24 + 1), b"\xff\xfe{\0}\0", "{}"),
        *('{"model_type": "llama"}', '{"model_type": "llama", "num_hidden_layers": 2, "deep": ' + "[" * 100_000),
        '{"model_type": "llama", "num_hidden_layers": ' + "9" * 5_000 + "}",
        *(
            f'{{"model_type": "llama", "num_hidden_layers": {blocks}}}'
            for blocks in ("Infinity", "NaN", "1e400", "null")
        ),
        *(f'{{"model_type": "llama", "n_layer": {blocks}}}' for blocks in ('"many"', '"3"', -1, 0, 1001, 2.5, "true")),
        *(f'{{"model_type": {kind}, "n_layer": 2}}' for kind in ("7", "null", '["llama"]', f'"{"x" * 500}"')),
    ],
    ids=lambda config: repr(config[:60]),
)
def test_a_folder_that_cannot_be_used_hides_no_other(settings: ModelSettings, config: str | bytes) -> None:
    register(settings.folder, "broken", "")
    (settings.folder / "broken" / "config.json").write_bytes(config.encode() if isinstance(config, str) else config)
    is_alone(settings, "broken")


@pytest.mark.parametrize(
    "sizes",
    [
        *({"vocab_size": size} for size in (10**12, 0, -1, 1e300, "32000", [1])),
        *({"head_dim": 10**9}, {"num_attention_heads": 10**6}, {"num_key_value_heads": 0}, {"hidden_size": 2**40}),
        *({"intermediate_size": 2**60}, {"max_position_embeddings": -5}, {"n_inner": 2**50}),
        *({"num_attention_heads": 6, "num_key_value_heads": 4}, {"hidden_size": 7, "num_attention_heads": 2}),
    ],
    ids=json.dumps,
)
def test_absurd_sizes_are_refused_with_their_name(settings: ModelSettings, sizes: dict[str, Any]) -> None:
    register(settings.folder, "broken", {"model_type": "llama", "num_hidden_layers": 30, **sizes})
    is_alone(settings, "broken")
    assert next(iter(sizes)) in problems(settings)["broken"]


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "link to nothing", "device"])
def test_what_is_no_file_in_the_place_of_a_configuration_is_not_waited_for(
    settings: ModelSettings, file: str, kind: str
) -> None:
    place = settings.folder / "broken" / file
    place.parent.mkdir()
    match kind:
        case "pipe":
            os.mkfifo(place)
        case "folder":
            place.mkdir()
        case "loop":
            place.symlink_to(place)
        case "link to nothing":
            place.symlink_to("nothing")
        case "device":
            place.symlink_to("/dev/zero")
    is_alone(settings, "broken")


@pytest.mark.parametrize(
    "changes",
    [{"r": "Infinity"}, {"r": -1}, {"r": 10**30}, {"base_model_name_or_path": 7}, {"target_modules": {"a": 1}}],
    ids=json.dumps,
)
def test_an_adapter_of_another_form_hides_no_other(settings: ModelSettings, changes: dict[str, Any]) -> None:
    register_adapter(settings, "broken", **changes)
    is_alone(settings, "broken")


def test_what_is_no_model_is_not_listed(settings: ModelSettings) -> None:
    (settings.folder / "empty").mkdir()
    (settings.folder / "file").write_text("x")
    register(settings.folder, ".hidden", {"model_type": "llama"})
    register(settings.folder, "a b", {"model_type": "llama"})
    register(settings.folder / "deep", "er", {"model_type": "llama"})
    assert len(registered(settings)) == 3
    assert registered(ModelSettings(folder=settings.folder / "none")) == []


@pytest.mark.parametrize("name", ["none", "", "..", "small\0", "SMALL", ".", "~", "small "])
def test_a_name_that_is_not_registered_is_refused_with_those_that_are(settings: ModelSettings, name: str) -> None:
    error = refusal(settings, name)
    assert error.param == "model"
    assert "gpt, small" in error.detail


def test_a_type_that_is_not_supported_is_refused_with_those_that_are(settings: ModelSettings) -> None:
    error = refusal(settings, "bert")
    assert error.param == "model"
    assert all(kind in error.detail for kind in ("'bert'", *MODEL_TYPES))


def test_more_blocks_than_the_model_has_are_refused(settings: ModelSettings) -> None:
    resolve(settings, "gpt", blocks(12))
    assert refusal(settings, "gpt", embedding={"kind": "hidden", "blocks": 13}).param == "embedding.blocks"


@pytest.mark.parametrize("given", [{"method": "exact_influence"}, {"method": "random"}, {"embedding": {"kind": "rds"}}])
def test_blocks_that_are_not_embedded_are_not_counted(settings: ModelSettings, given: dict[str, Any]) -> None:
    register(settings.folder, "flat", {"model_type": "gpt2", "n_layer": 2})
    assert resolve(settings, "flat", Parameters(**given))["name"] == "flat"


# Adapters and optimiser states

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "small", "r": 8, "lora_alpha": 16, "bias": "none"}


def register_adapter(settings: ModelSettings, name: str = "tuned", **changes: Any) -> None:
    (settings.folder / name).mkdir()
    (settings.folder / name / "adapter_config.json").write_text(json.dumps({**ADAPTER, **changes}))


def test_an_adapter_is_listed_and_resolved_with_its_base(settings: ModelSettings) -> None:
    register_adapter(settings, use_dora=False, modules_to_save=None, rank_pattern={"q_proj": 4})
    assert registered(settings)[-1] == RegisteredModel(name="tuned", model_type="llama", blocks=30, base="small")
    base = {"kind": "registered", "name": "small"}
    assert resolve(settings, "tuned", blocks(30)) == {"kind": "registered", "name": "tuned", "base": base}
    assert refusal(settings, "tuned", embedding={"kind": "hidden", "blocks": 31}).param == "embedding.blocks"


def test_the_base_of_an_adapter_may_be_of_the_hub(settings: ModelSettings, hub: Hub) -> None:
    register_adapter(settings, base_model_name_or_path="org/model", revision="refs/pr/1")
    assert registered(settings)[-1].blocks is None
    base = {"kind": "hub", "id": "org/model", "revision": "refs/pr/1", "commit": COMMIT}
    assert resolve(settings, "tuned", Parameters())["base"] == base


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3'; only LORA"),
        ({"use_dora": True}, "use_dora to True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias to 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"base_model_name_or_path": "/home/me/model"}, "neither a registered name nor a hub id"),
        ({"base_model_name_or_path": "gone"}, "base_model_name_or_path"),
        ({"base_model_name_or_path": ".."}, "base_model_name_or_path"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "bert"}, "supported are"),
        ({"base_model_name_or_path": "other"}, "itself an adapter"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_with_the_reason(
    settings: ModelSettings, changes: dict[str, Any], said: str
) -> None:
    register(settings.folder, "other", {"model_type": "llama", "num_hidden_layers": 30})
    (settings.folder / "other" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    register_adapter(settings, **changes)
    error = refusal(settings, "tuned")
    assert error.param == "model"
    assert said in error.detail


def test_an_adapter_is_not_wrapped_into_another(settings: ModelSettings) -> None:
    register_adapter(settings)
    resolve(settings, "tuned", Parameters(warmup={}))  # type: ignore[arg-type]
    assert refusal(settings, "tuned", warmup={"lora": {}}).param == "warmup.lora"


@pytest.mark.parametrize("optimizer", [{"type": "adam"}, {"type": "adamw"}, {"type": "sgd", "momentum": 0.9}])
def test_an_optimiser_with_a_state_needs_one(settings: ModelSettings, optimizer: dict[str, Any]) -> None:
    error = refusal(settings, "small", optimizer=optimizer)
    assert error.param == "optimizer.type"
    assert "warmup" in error.detail
    assert "optimizer.safetensors" in error.detail
    (settings.folder / "small" / "optimizer.safetensors").write_bytes(b"")
    assert registered(settings)[-1].optimizer_state
    resolved = resolve(settings, "small", Parameters(optimizer=optimizer))  # type: ignore[arg-type]
    assert resolved == {"kind": "registered", "name": "small", "optimizer_state": True}


def test_the_warm_up_makes_the_state_of_a_hub_model(settings: ModelSettings, hub: Hub) -> None:
    assert refusal(settings, "org/model", optimizer={"type": "adamw"}).param == "optimizer.type"
    warmed = Parameters(optimizer={"type": "adamw"}, warmup={})  # type: ignore[arg-type]
    assert "optimizer_state" not in resolve(settings, "org/model", warmed)


# Of the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub.running() as hub:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        yield hub


@pytest.mark.parametrize("model", ["org/model", HubModel(id="org/model")])
def test_a_hub_model_is_resolved_to_a_commit(settings: ModelSettings, hub: Hub, model: str | HubModel) -> None:
    resolved = resolve(settings, model, Parameters())
    assert resolved == {"kind": "hub", "id": "org/model", "revision": "main", "commit": COMMIT}
    assert hub.asked == ["org/model@main"]


def test_the_revision_that_was_asked_for_is_the_one_resolved(settings: ModelSettings, hub: Hub) -> None:
    resolved = resolve(settings, HubModel(id="org/model", revision="refs/pr/1"), Parameters())
    assert (resolved["revision"], resolved["commit"]) == ("refs/pr/1", COMMIT)
    assert hub.asked == ["org/model@refs/pr/1"]


@pytest.mark.parametrize(
    ("model", "param", "part"),
    [
        (HubModel(id="org/model", revision="v9"), "model.revision", "'v9'"),
        ("org/none", "model", "'org/none'"),
        ("org/gated", "model", "'org/gated'"),
        ("org/pickles", "model", "safetensors"),
        ("org/adapter", "model", "register it"),
    ],
)
def test_a_hub_model_that_cannot_be_used_is_refused(
    settings: ModelSettings, hub: Hub, model: str | HubModel, param: str, part: str
) -> None:
    hub.failures["org/gated"] = (403, {"X-Error-Code": "GatedRepo"})
    error = refusal(settings, model)
    assert error.param == param
    assert part in error.detail


@pytest.mark.parametrize("status", [429, 500, 503, 200])
def test_a_hub_that_fails_or_answers_nonsense_is_unavailable(settings: ModelSettings, hub: Hub, status: int) -> None:
    if status == 200:
        hub.body = b"<html>Please log in to the network</html>"
    else:
        hub.failures["org/model"] = (status, {})
    assert refusal(settings, "org/model", Unavailable).status == 503


def test_a_hub_that_cannot_be_reached_is_unavailable(settings: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    error = refusal(settings, "org/model", Unavailable)
    assert error.param == "model"
    assert "registered" in error.detail


@pytest.mark.parametrize(
    "name",
    [
        *("a/b/c", "/", "a/", "/b", "../etc", "a/..", "org/a--b", "org/a..b", "org/x.git"),
        *("é/é", "a/b\0", "a/b?x=1", "a/b\n"),
    ],
)
def test_what_is_no_hub_id_is_refused_and_the_hub_not_asked(settings: ModelSettings, hub: Hub, name: str) -> None:
    assert refusal(settings, name).param == "model"
    assert hub.asked == []


@pytest.mark.parametrize("hub_id", ["a/b/c", "a", "", "a/b\n", "../b", "a/b c"])
def test_an_id_in_an_object_must_be_a_hub_id(hub_id: str) -> None:
    with pytest.raises(ValidationError, match="id"):
        HubModel(id=hub_id)


def test_a_hub_model_that_is_not_on_the_list_is_refused_and_the_hub_not_asked(
    settings: ModelSettings, hub: Hub
) -> None:
    for allowed, model in (((), "org/model"), (("Org/*", "org/mode", "other/*"), HubModel(id="org/model"))):
        error = refusal(settings.model_copy(update={"hub": allowed}), model)
        assert error.param == "model"
        assert "WINNOW_MODELS__HUB" in error.detail
        assert "other" not in error.detail, "what else is allowed is not everybody's to know"
    closed = ModelSettings(folder=settings.folder)
    assert resolve(closed, "small", Parameters())["kind"] == "registered"
    register_adapter(closed, base_model_name_or_path="org/model")
    assert "WINNOW_MODELS__HUB" in refusal(closed, "tuned").detail
    assert hub.asked == []


@pytest.mark.parametrize("allowed", ["org/model", "org/*", "*/model", "*/*", "o?g/[m]odel"])
def test_the_list_is_of_patterns(settings: ModelSettings, hub: Hub, allowed: str) -> None:
    assert resolve(settings.model_copy(update={"hub": (allowed,)}), "org/model", Parameters())["commit"] == COMMIT


@pytest.mark.parametrize(
    "revision", ["../../etc", "/etc/passwd", "a/../b", "v1?x=1", "a#b", "a b", "..", "v\n", "%2e%2e"]
)
def test_a_revision_that_is_a_path_or_a_query_is_refused_and_the_hub_not_asked(
    settings: ModelSettings, hub: Hub, revision: str
) -> None:
    error = refusal(settings, HubModel(id="org/model", revision=revision))
    assert error.param == "model.revision"
    assert hub.asked == []
