"""The compose file and the image: what they promise about users, file systems, ports, secrets and versions holds for each."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name
from support.compose_file import (
    COMPOSE,
    ROOT,
    compose,
    image_command,
    image_environment,
    instructions,
    stage,
    target_of,
)
from support.distribution import required

from service.db import budget
from service.settings import DatabaseSettings

SERVICES: dict[str, Any] = compose()["services"]
LONG_RUNNING = sorted(set(SERVICES) - {"migrate"})
OURS = {name: target for name, service in SERVICES.items() if (target := target_of(service))}
WORKERS = ("worker", "worker-gpu")

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
def test_images_are_pinned_by_version_and_digest(name: str) -> None:
    if name not in OURS:
        assert re.search(r":v?\d+\.\d+(\.\d+)?@sha256:[0-9a-f]{64}$", SERVICES[name]["image"])


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_long_running_services_are_watched_restarted_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["restart"] == "unless-stopped"
    assert "stop_grace_period" in service
    assert {"memory", "cpus", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}


def test_nothing_of_ours_starts_before_the_migrations_are_done() -> None:
    assert SERVICES["migrate"]["restart"] == "no"
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in OURS.keys() - {"migrate"}:
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
    own = {name: int(SERVICES[name]["environment"]["WINNOW_WORKER__METRICS_PORT"]) for name in WORKERS}
    assert {SERVICES[name]["environment"]["WINNOW_WORKER__METRICS_HOST"] for name in WORKERS} == {"0.0.0.0"}
    command = image_command("api")
    assert looked == {"api": int(command[command.index("--port") + 1]), **own}


def test_postgresql_allows_for_the_connections_of_all_processes() -> None:
    command = SERVICES["api"]["command"]
    processes = int(command[command.index("--processes") + 1])
    (allowed,) = re.findall(r"max_connections=(\d+)", " ".join(SERVICES["postgres"]["command"]))
    settings = DatabaseSettings(url="postgresql://")
    assert budget.most(settings, api_processes=processes, workers=2) + 3 <= int(allowed)


@pytest.mark.parametrize(("target", "program"), [("api", "python"), ("worker", "celery")])
def test_an_image_runs_without_root_and_without_tools_to_build(target: str, program: str) -> None:
    found = stage(target)
    names = [name for name, _ in found]
    (user,) = (rest for name, rest in found if name == "USER")
    runs = [rest for name, rest in found if name == "RUN"]
    assert {user} == {SERVICES[name]["user"] for name in OURS}
    assert user.partition(":")[0] in next(run for run in runs if "useradd" in run)
    assert names.index("USER") < names.index("CMD")
    assert any("pip uninstall" in run for run in runs)
    assert not any("pip install" in run or "apt-get" in run for run in runs)
    assert ("STOPSIGNAL", "SIGTERM") in found
    assert image_command(target)[0] == program  # a list: the signal goes to the process itself
    assert image_environment(target)["TMPDIR"] in SERVICES[target]["volumes"]


def test_each_service_runs_the_image_of_its_part() -> None:
    assert OURS == {"migrate": "api", "api": "api", "worker": "worker", "worker-gpu": "worker"}
    # The API runs the image that migrate builds.
    built = {name: SERVICES[name]["build"] for name in OURS if name != "api"}
    assert {name: build["target"] for name, build in built.items()} == {k: v for k, v in OURS.items() if k != "api"}
    assert SERVICES["api"]["image"] == SERVICES["migrate"]["image"]
    assert built["worker-gpu"]["args"] == {"REQUIREMENTS": "worker-cuda", "TORCH_INDEX": ""}


def locked(name: str) -> dict[str, str]:
    """The versions of a file of requirements/, by the name of the package."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    found = re.findall(r"^([\w.-]+)==(\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M)
    assert "".join(f"{package}=={version} \\\n{hashes}" for package, version, hashes in found) == text
    return {str(canonicalize_name(package)): version for package, version, _ in found}


@pytest.mark.parametrize(
    ("name", "extras"),
    [("api", ["server"]), ("worker-cpu", ["worker"]), ("worker-cuda", ["worker", "quantised"])],
)
def test_an_image_has_the_packages_of_its_extras_in_the_pinned_versions_with_hashes(
    name: str, extras: list[str]
) -> None:
    versions = locked(name)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins |= dict(line.split("==") for line in (ROOT / "constraints-torch.txt").read_text().split())
    pinned = {str(canonicalize_name(package)): version for package, version in pins.items()}
    assert {each for each in required(extras) if not each.startswith(("nvidia-", "cuda-", "triton"))} <= versions.keys()
    for package in set(versions) & set(pinned):
        assert versions[package].removesuffix("+cpu") == pinned[package]
    assert ("torch" in versions) is (name != "api")
    assert any(package.startswith("nvidia-") for package in versions) is (name == "worker-cuda")


def test_nothing_is_installed_into_an_image_without_its_hash() -> None:
    for name, rest in instructions():
        if name == "RUN" and re.search(r"\bpip .*(install|wheel)\b", rest) and "uninstall" not in rest:
            assert any(option in rest for option in ("--require-hashes", "--no-index", "pip wheel --no-deps"))
    assert locked("build").keys() == {"setuptools"}
    (base,) = (rest.partition("=")[2] for name, rest in instructions() if name == "ARG" and rest.startswith("BASE="))
    assert re.search(r"@sha256:[0-9a-f]{64}$", base)
    assert {rest.split()[0] for name, rest in instructions() if name == "FROM"} <= {"${BASE}", "build", "runtime"}


def test_compose_up_makes_what_the_file_refers_to_and_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    script = shutil.copy(ROOT / "ops/compose-up", tmp_path / "ops")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/podman").write_text('#!/bin/sh\necho "$COMPOSE_PROFILES $@" > called\n')
    (tmp_path / "bin/podman").chmod(0o755)
    (tmp_path / ".env").write_text("WINNOW_CPUS=1\n")
    secrets = tmp_path / "secrets"
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "DOCKER": "podman"}

    def run() -> dict[str, str]:
        subprocess.run([script, "--detach"], env=environment, check=True, cwd="/", stdout=subprocess.DEVNULL)
        assert (tmp_path / "called").read_text() == "cpu compose up --build --wait --detach\n"
        return {path.name: path.read_text() for path in secrets.iterdir()}

    made = run()
    assert made.keys() == compose()["secrets"].keys()
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in made.values())
    assert len(set(made.values())) == len(made)
    assert (secrets.stat().st_mode & 0o777, (tmp_path / "models").stat().st_mode & 0o777) == (0o700, 0o755)
    assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o444}
    assert (tmp_path / ".env").read_text() == f"WINNOW_CPUS=1\nWINNOW_WORKER_CPUS={os.cpu_count()}\n"
    assert run() == made
    assert (tmp_path / ".env").read_text().count("WORKER_CPUS") == 1


@pytest.mark.parametrize("name", OURS)
def test_folders_that_the_image_writes_to_are_volumes(name: str) -> None:
    made = next(
        rest for instruction, rest in stage(OURS[name]) if instruction == "RUN" and "install -d" in rest
    ).split()
    for volume in SERVICES[name].get("volumes", []):
        target = volume.split(":")[1] if ":" in volume else volume
        assert target in made or target == "/var/tmp"  # one that docker makes is root's


def test_the_context_of_the_build_is_what_the_image_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    assert {source for words in copied for source in words[:-1]} == allowed
