"""What Prometheus reads of the API; and that dashboard and alerts ask for nothing that is not exported."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.registry import Collector
from support.ledger_world import ledger_world
from support.metrics_world import samples, settings_of, value
from support.world import World

from service.health.exposition import ApiMetrics
from service.settings import ApiSettings
from service.shares import Shares
from worker.metrics import WorkerMetrics

OPS = Path(__file__).parents[3] / "ops"


def test_requests_are_counted_by_the_template_of_their_route(api: World) -> None:
    job_ids = ["job_" + letter * 26 for letter in "ab"]
    for path in (*(f"/v1/selection-jobs/{job_id}" for job_id in job_ids), "/v1/datasets", "/nowhere/x", "/nowhere/y"):
        api.client.get(path)
    api.client.put("/healthz")
    api.client.request("BREW", "/healthz")
    answer = api.client.get("/metrics", headers={"Authorization": ""})  # no key is needed
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    template = "/v1/selection-jobs/{job_id}"
    assert value(found, "http_requests_total", method="GET", route=template, status="404") == 2
    assert value(found, "http_requests_total", method="GET", route="/v1/datasets", status="200") == 1
    assert value(found, "http_requests_total", method="GET", route="(none)", status="404") == 2
    assert value(found, "http_requests_total", method="PUT", route="/healthz", status="405") == 1
    assert value(found, "http_requests_total", method="other", route="/healthz", status="405") == 1
    assert value(found, "http_request_seconds_count", method="GET", route=template) == 2
    assert value(found, "http_requests_in_flight") == 1, "this one"
    assert not any(secret in answer.text for secret in (*job_ids, "nowhere", "tnt_", "BREW"))


def test_a_crash_is_counted_as_what_the_client_gets(api: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("service.datasets.repository.page", crash)
    with pytest.raises(RuntimeError, match="broken"):
        api.client.get("/v1/datasets")  # the test's client raises what a real one gets as 500
    found = samples(api.client.get("/metrics").text)
    assert value(found, "http_requests_total", method="GET", route="/v1/datasets", status="500") == 1


def test_it_is_documented(api: World) -> None:
    document = api.client.get("/openapi.json").json()
    operation = document["paths"]["/metrics"]["get"]
    assert "security" not in operation
    assert list(operation["responses"]["200"]["content"]) == ["text/plain"]


# Dashboard and alerts


def exported(settings: ApiSettings) -> dict[str, set[str]]:
    """The labels of every series that the API or a worker can export, by its name."""
    api = ApiMetrics(settings, Shares(settings.shares, connections=1))
    found: dict[str, set[str]] = {}
    for registry in (api.registry, WorkerMetrics().registry):
        for collector in registry._collector_to_names:
            found |= _series(collector)
    api.close()
    return found


def _series(collector: Collector) -> dict[str, set[str]]:
    labels = set(getattr(collector, "_labelnames", ()))
    series: dict[str, set[str]] = {}
    for family in collector.collect():
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        own = labels | {name for sample in family.samples for name in sample.labels}
        series |= {family.name + ending: own | ({"le"} if ending == "_bucket" else set()) for ending in endings}
    return series


def dashboard() -> Any:
    return json.loads((OPS / "grafana" / "winnow.json").read_text())


def alerts() -> list[Any]:
    return [rule for group in yaml.safe_load((OPS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def panels() -> list[Any]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]] + [rule["expr"] for rule in alerts()]


def test_dashboard_and_alerts_ask_for_nothing_that_is_not_exported(
    postgres_url: str, broker_url: str, tmp_path: Path
) -> None:
    with ledger_world(postgres_url) as world:
        world.job()
        series = exported(settings_of(world, broker_url, tmp_path))
    assert {"winnow_units", "winnow_http_request_seconds_bucket", "winnow_worker_units_total"} <= series.keys()
    asked = set()
    for expression in expressions():
        for name, matchers in re.findall(r"\b((?:winnow|process|python)_\w+)(\{[^}]*\})?", expression):
            assert name in series, f"{name} is not exported: {expression}"
            asked.add(name)
            matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert matched <= series[name] | {"job", "instance"}, f"{matched} of {name}: {expression}"
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")}
        known = set().union(*(series[name] for name in series if name in expression)) | {"job", "instance"}
        assert grouped <= known, f"{grouped}: {expression}"
    ours = {name for name in series if name.startswith("winnow_") and not name.endswith(("_count", "_sum"))}
    assert ours - asked == set(), "exported, and shown nowhere"


def test_the_dashboard_can_be_imported() -> None:
    found = dashboard()
    assert [row["title"] for row in found["panels"] if row["type"] == "row"] == [
        "Service health",
        "API",
        "Jobs and queue",
        "Workers",
    ]
    assert [variable["type"] for variable in found["templating"]["list"]] == ["datasource"]
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["targets"]
        assert panel["description"]
    taken = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in found["panels"]]
    assert len(taken) == len(set(taken)), "panels lie upon each other"


def test_every_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names)) >= 8
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"]
        assert re.search(r"[.!]$", rule["annotations"]["action"]), rule["alert"]
        assert rule["for"]


def test_prometheus_reads_api_workers_and_alerts() -> None:
    found = yaml.safe_load((OPS / "prometheus.yml").read_text())
    assert all((OPS / name).is_file() for name in found["rule_files"])
    jobs = {job["job_name"]: job["dns_sd_configs"][0] for job in found["scrape_configs"]}
    assert jobs.keys() == {"winnow-api", "winnow-worker"}
    services = yaml.safe_load((OPS.parent / "docker-compose.yml").read_text())["services"]
    assert {name for job in jobs.values() for name in job["names"]} <= services.keys()
    for name in jobs["winnow-worker"]["names"]:
        assert services[name]["environment"]["WINNOW_WORKER__METRICS_PORT"] == str(jobs["winnow-worker"]["port"])
