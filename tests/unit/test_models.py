"""Models a job may name: what is registered, and what a hub says, here a loopback server that speaks the little we ask."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from pydantic import ValidationError

from service.errors import ApiError, Unavailable, Unprocessable
from service.jobs.parameters import Parameters
from service.models import MODEL_TYPES, HubModel, RegisteredModel, registered, resolve
from service.settings import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
    return Parameters(embedding={"blocks": count})  # type: ignore[arg-type]


def refusal(settings: ModelSettings, model: str | HubModel, kind: type[ApiError] = Unprocessable, **given: Any) -> Any:
    with pytest.raises(kind) as caught:
        resolve(settings, model, Parameters(**given))
    return caught.value


# Registered


def test_the_registered_models_are_listed_by_name_with_their_blocks(settings: ModelSettings) -> None:
    assert registered(settings) == [
        RegisteredModel(name="bert", model_type="bert", blocks=12),
        RegisteredModel(name="gpt", model_type="gpt2", blocks=12),
        RegisteredModel(name="small", model_type="llama", blocks=30),
    ]


def test_no_folder_is_no_model(tmp_path: Path) -> None:
    assert registered(ModelSettings(folder=tmp_path / "none")) == []


def test_a_link_that_leads_out_of_the_folder_is_no_model(settings: ModelSettings, tmp_path: Path) -> None:
    inner = tmp_path / "models"
    register(inner, "inside", {"model_type": "llama", "num_hidden_layers": 30})
    (inner / "outside").symlink_to(tmp_path / "small")
    (inner / "alias").symlink_to(inner / "inside")
    settings = ModelSettings(folder=inner)
    assert [model.name for model in registered(settings)] == ["alias", "inside"]
    assert refusal(settings, "outside").param == "model"


@pytest.mark.parametrize(
    "config", ["{", "[]", "[" * 100_000, "null", '{"num_hidden_layers": null}', '{"n_layer": "many"}', "\0"]
)
def test_a_folder_that_cannot_be_used_hides_no_other(settings: ModelSettings, config: str) -> None:
    register(settings.folder, "broken", config)
    assert [model.name for model in registered(settings)] == ["bert", "gpt", "small"]
    assert resolve(settings, "small", Parameters()) == {"kind": "registered", "name": "small"}
    assert refusal(settings, "broken").param == "model"


def test_what_is_no_model_is_not_listed(settings: ModelSettings) -> None:
    (settings.folder / "empty").mkdir()
    (settings.folder / "file").write_text("x")
    register(settings.folder, ".hidden", {"model_type": "llama"})
    register(settings.folder, "a b", {"model_type": "llama"})
    register(settings.folder / "deep", "er", {"model_type": "llama"})
    assert len(registered(settings)) == 3


def test_a_registered_model_is_resolved_to_its_name_and_to_no_path(settings: ModelSettings) -> None:
    assert resolve(settings, "small", blocks(30)) == {"kind": "registered", "name": "small"}


@pytest.mark.parametrize("name", ["none", "", "..", "small\0", "SMALL", ".", "~", "small "])
def test_a_name_that_is_not_registered_is_refused_with_those_that_are(settings: ModelSettings, name: str) -> None:
    error = refusal(settings, name)
    assert error.param == "model"
    assert "bert, gpt, small" in error.detail


def test_a_type_that_is_not_supported_is_refused(settings: ModelSettings) -> None:
    error = refusal(settings, "bert")
    assert error.param == "model"
    assert "'bert'" in error.detail
    assert all(kind in error.detail for kind in MODEL_TYPES)


def test_more_blocks_than_the_model_has_are_refused(settings: ModelSettings) -> None:
    resolve(settings, "gpt", blocks(12))
    assert refusal(settings, "gpt", embedding={"blocks": 13}).param == "embedding.blocks"


@pytest.mark.parametrize(
    "given",
    [{"method": "exact_influence"}, {"method": "random"}, {"embedding": {"kind": "rds"}}],
)
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
    assert refusal(settings, "tuned", embedding={"blocks": 31}).param == "embedding.blocks"


def test_the_base_of_an_adapter_may_be_of_the_hub(settings: ModelSettings, hub: "Hub") -> None:
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
        ({"base_model_name_or_path": "other"}, "adapter itself"),
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


def test_the_warm_up_makes_the_state_of_a_hub_model(settings: ModelSettings, hub: "Hub") -> None:
    assert refusal(settings, "org/model", optimizer={"type": "adamw"}).param == "optimizer.type"
    warmed = Parameters(optimizer={"type": "adamw"}, warmup={})  # type: ignore[arg-type]
    assert "optimizer_state" not in resolve(settings, "org/model", warmed)


# Of the hub


@dataclass
class Hub:
    """What the server knows: (id, revision) -> its files; and what it was asked."""

    url: str
    models: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    failures: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    body: bytes | None = None
    asked: list[str] = field(default_factory=list)


def _answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    if not path.startswith("/api/models/"):  # the library asks about itself too
        return 404, {}, b"{}"
    repo, _, revision = unquote(urlsplit(path).path).removeprefix("/api/models/").partition("/revision/")
    hub.asked.append(f"{repo}@{revision}")
    if repo in hub.failures:
        return *hub.failures[repo], b"{}"
    if not any(known == repo for known, _ in hub.models):
        return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
    if (repo, revision) not in hub.models:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    files = [{"rfilename": name} for name in hub.models[repo, revision]]
    model = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
    return 200, {}, hub.body or json.dumps(model).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = _answer(hub, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        hub.models["org/model", "main"] = ["config.json", "model.safetensors"]
        hub.models["org/model", "refs/pr/1"] = ["config.json", "model-00001-of-00002.safetensors"]
        hub.models["org/adapter", "main"] = ["adapter_config.json", "adapter_model.safetensors"]
        hub.models["org/pickles", "main"] = ["config.json", "pytorch_model.bin"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("model", ["org/model", HubModel(id="org/model")])
def test_a_hub_model_is_resolved_to_a_commit(settings: ModelSettings, hub: Hub, model: str | HubModel) -> None:
    resolved = resolve(settings, model, Parameters())
    assert resolved == {"kind": "hub", "id": "org/model", "revision": "main", "commit": COMMIT}
    assert hub.asked == ["org/model@main"]


def test_the_revision_that_was_asked_for_is_the_one_resolved(settings: ModelSettings, hub: Hub) -> None:
    resolved = resolve(settings, HubModel(id="org/model", revision="refs/pr/1"), Parameters())
    assert (resolved["revision"], resolved["commit"]) == ("refs/pr/1", COMMIT)
    assert hub.asked == ["org/model@refs/pr/1"]


def test_a_revision_that_is_missing_is_named(settings: ModelSettings, hub: Hub) -> None:
    error = refusal(settings, HubModel(id="org/model", revision="v9"))
    assert error.param == "model.revision"
    assert "'v9'" in error.detail


def test_a_model_that_is_missing_is_named(settings: ModelSettings, hub: Hub) -> None:
    error = refusal(settings, "org/none")
    assert error.param == "model"
    assert "'org/none'" in error.detail


def test_a_gated_model_is_refused_like_one_that_is_missing(settings: ModelSettings, hub: Hub) -> None:
    hub.failures["org/gated"] = (403, {"X-Error-Code": "GatedRepo"})
    assert refusal(settings, "org/gated").param == "model"


def test_a_model_without_safetensors_is_refused(settings: ModelSettings, hub: Hub) -> None:
    error = refusal(settings, "org/pickles")
    assert error.param == "model"
    assert "safetensors" in error.detail


def test_an_adapter_of_the_hub_is_refused_with_what_to_do(settings: ModelSettings, hub: Hub) -> None:
    assert "register it" in refusal(settings, "org/adapter").detail


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_is_unavailable(settings: ModelSettings, hub: Hub, status: int) -> None:
    hub.failures["org/model"] = (status, {})
    assert refusal(settings, "org/model", Unavailable).status == 503


def test_a_hub_that_does_not_speak_json_is_unavailable(settings: ModelSettings, hub: Hub) -> None:
    hub.body = b"<html>Please log in to the network</html>"
    refusal(settings, "org/model", Unavailable)


def test_a_hub_that_is_away_is_unavailable(settings: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    error = refusal(settings, "org/model", Unavailable)
    assert error.param == "model"
    assert "registered" in error.detail


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "/",
        "a/",
        "/b",
        "../etc",
        "a/..",
        "org/a--b",
        "org/a..b",
        "org/x.git",
        "é/é",
        "a/b\0",
        "a/b?x=1",
        "a/b\n",
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
