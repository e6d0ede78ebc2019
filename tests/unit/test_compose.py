"""The compose file and the image: what they promise about users, file systems, ports, secrets and versions holds for each."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_file import COMPOSE, ROOT, compose, image_command, image_environment, instructions, last_stage

SERVICES: dict[str, Any] = compose()["services"]
LONG_RUNNING = sorted(set(SERVICES) - {"migrate"})
OURS = ("migrate", "api", "worker", "worker-gpu")

every_service = pytest.mark.parametrize("name", sorted(SERVICES))


def test_it_is_valid_by_the_schema_of_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@every_service
def test_no_service_can_be_root_or_write_where_it_need_not(name: str) -> None:
    service = SERVICES[name]
    user, _, group = service["user"].partition(":")
    assert int(user) > 0
    assert group
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    mounts = [volume for volume in service.get("volumes", []) if volume.startswith((".", "/")) and ":" in volume]
    assert all(volume.endswith(":ro") for volume in mounts), mounts  # what is the host's is only read


@every_service
def test_a_port_is_open_to_the_host_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


def test_the_servers_of_data_are_reached_by_nothing_outside() -> None:
    assert compose()["networks"]["data"] == {"internal": True}
    for name in ("postgres", "redis"):
        assert SERVICES[name]["networks"] == ["data"]
        assert "ports" not in SERVICES[name]


@every_service
def test_secrets_are_files_and_no_value_holds_one(name: str) -> None:
    service = SERVICES[name]
    for variable, value in service.get("environment", {}).items():
        if re.search(r"password|secret|token|key", variable, re.IGNORECASE):
            assert value.startswith("/run/secrets/"), variable
        assert not re.search(r"://[^/@]*:[^/@]*@", value), variable
    declared = compose()["secrets"]
    mentioned = set(re.findall(r"/run/secrets/(\w+)", json.dumps(service)))
    assert mentioned <= set(service.get("secrets", [])) <= set(declared)
    assert all(declared[secret] == {"file": f"./secrets/{secret}"} for secret in declared)


def test_each_part_of_ours_holds_the_secrets_that_it_needs_and_no_other() -> None:
    database, broker = "winnow_database__password", "winnow_broker__password"
    assert set(SERVICES["migrate"]["secrets"]) == {database}
    assert set(SERVICES["worker"]["secrets"]) == set(SERVICES["worker-gpu"]["secrets"]) == {database, broker}
    assert set(SERVICES["api"]["secrets"]) == {database, broker, "winnow_secret_key"}


def test_the_header_names_every_variable_secret_and_profile() -> None:
    text = COMPOSE.read_text()
    header = text[: text.index("\nx-")]
    body = text[len(header) :]
    assert set(re.findall(r"\$\{(\w+)", re.sub(r"\$\$\{", "", body))) == set(
        re.findall(r"^#   (WINNOW_\w+)", header, re.M)
    )
    for name in (*compose()["secrets"], *(p for s in SERVICES.values() for p in s.get("profiles", []))):
        assert name in header


@every_service
def test_images_are_of_one_major_version(name: str) -> None:
    image, _, tag = SERVICES[name]["image"].rpartition(":")
    if name in OURS:
        assert image in ("winnow", "winnow-cuda")
    else:
        assert re.fullmatch(r"v?\d+(\.\d+)*", tag)


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_what_runs_on_is_watched_started_again_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["restart"] == "unless-stopped"
    assert "stop_grace_period" in service
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}


def test_nothing_of_ours_starts_before_the_migrations_are_done() -> None:
    assert SERVICES["migrate"]["restart"] == "no"
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("api", "worker", "worker-gpu"):
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_files_of_the_repository_that_are_mounted_are_there() -> None:
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    for path in mounted:
        assert not path.startswith("./ops") or (ROOT / path).exists(), path


def test_prometheus_is_given_every_file_of_rules_that_it_reads() -> None:
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    inside = {target: source for source, target in mounts.items()}
    configuration = yaml.safe_load((ROOT / inside["/etc/prometheus/prometheus.yml"]).read_text())
    for rules in configuration.get("rule_files", []):
        assert str(Path("/etc/prometheus") / rules) in inside


def test_prometheus_looks_where_the_services_answer() -> None:
    jobs = yaml.safe_load((ROOT / "ops/prometheus.yml").read_text())["scrape_configs"]
    looked = {name: found["port"] for job in jobs for found in job["dns_sd_configs"] for name in found["names"]}
    workers = ("worker", "worker-gpu")
    own = {name: int(SERVICES[name]["environment"]["WINNOW_WORKER__METRICS_PORT"]) for name in workers}
    assert {SERVICES[name]["environment"]["WINNOW_WORKER__METRICS_HOST"] for name in workers} == {"0.0.0.0"}
    assert looked == {"api": int(image_command()[image_command().index("--port") + 1]), **own}


def test_the_image_runs_without_root_and_without_tools_to_build() -> None:
    stage = last_stage()
    names = [name for name, _ in stage]
    (user,) = (rest for name, rest in stage if name == "USER")
    assert user == SERVICES["api"]["user"] == SERVICES["migrate"]["user"]
    assert user.partition(":")[0] in next(rest for name, rest in stage if name == "RUN" and "useradd" in rest)
    assert names.index("USER") < names.index("CMD")
    assert any(name == "RUN" and "pip uninstall" in rest for name, rest in stage)
    assert not any(name == "RUN" and ("pip install" in rest or "apt-get" in rest) for name, rest in stage)
    assert ("STOPSIGNAL", "SIGTERM") in stage
    assert image_command()[0] == "uvicorn"  # a list: the signal goes to the process itself
    assert image_environment()["TMPDIR"] in SERVICES["api"]["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_folders_that_the_image_writes_to_are_volumes(name: str) -> None:
    made = next(rest for instruction, rest in last_stage() if instruction == "RUN" and "install -d" in rest).split()
    for volume in SERVICES[name].get("volumes", []):
        target = volume.split(":")[1] if ":" in volume else volume
        assert target in made or target == "/var/tmp"  # one that docker makes is root's


@pytest.mark.parametrize(
    ("index", "pinned"),
    [("https://download.pytorch.org/whl/cpu", True), ("https://download.pytorch.org/whl/cu130", False)],
)
def test_another_build_of_torch_is_not_held_to_the_pin_of_the_cpu_build(index: str, pinned: bool) -> None:
    run = next(rest for name, rest in instructions() if name == "RUN" and rest.endswith(" torch"))
    cpu = next(rest.partition("=")[2] for name, rest in instructions() if rest.startswith("CPU_INDEX="))
    variables = {"TORCH_INDEX": index, "CPU_INDEX": cpu}
    ran = subprocess.run(
        ["sh", "-ec", f"pip() {{ echo pip $@; }}; {run}"], env=variables, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "torch"
    assert f"--index-url {index}" in ran.stdout
    assert ("-c constraints-torch.txt" in ran.stdout) is pinned
    later = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest and rest != run]
    assert all("constraints-torch.txt" not in rest for rest in later)


def test_the_context_of_the_build_is_what_the_image_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    stages = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    assert {source for words in stages for source in words[:-1]} == allowed
