"""A real PostgreSQL in a pod, and its client in another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lab.pod import Pod, User
from lab.process import Completed

POSTGRES = 5432
_NOT_ROOT = User(never_root=True)


def find_initdb() -> Path:
    """Debian keeps the server's programs out of the PATH."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs or shutil.which("psql") is None:
        pytest.skip(
            "PostgreSQL is not installed (Debian: apt install postgresql postgresql-client)"
        )
    return programs[-1]


async def postgres(pod: Pod) -> None:
    """Debian's PostgreSQL as an ordinary user, with a password, so that authentication is a
    dialogue too."""
    initdb = find_initdb()
    data, password = pod.directory / "data", pod.directory / "password"
    password.write_text("tangerine\n")
    password.chmod(0o644)
    made = await pod.run(
        [
            str(initdb),
            "-D",
            str(data),
            "-U",
            "tester",
            "-A",
            "scram-sha-256",
            "--pwfile",
            str(password),
            "-N",
            "--no-locale",
            "-E",
            "UTF8",
        ],
        user=_NOT_ROOT,
        timeout=60,
    )
    assert made.ok, made.stderr.decode()
    with (data / "pg_hba.conf").open("a") as file:
        file.write("host all all 0.0.0.0/0 scram-sha-256\nhost all all ::/0 scram-sha-256\n")
    settings = [
        "listen_addresses=*",
        f"port={POSTGRES}",
        f"unix_socket_directories={pod.directory}",
        "fsync=off",
        "shared_buffers=8MB",
    ]
    command = [
        str(initdb.with_name("postgres")),
        "-D",
        str(data),
        *(part for each in settings for part in ("-c", each)),
    ]
    await pod.start("postgres", command, user=_NOT_ROOT, port=POSTGRES)


async def psql(
    pod: Pod,
    host: str,
    sql: str,
    *,
    port: int = POSTGRES,
    sslmode: str = "prefer",
    stdin: bytes = b"",
) -> Completed:
    """Run psql in a pod. Without `sql` it reads its commands from `stdin`."""
    target = (
        f"host={host} port={port} user=tester dbname=postgres sslmode={sslmode} connect_timeout=10"
    )
    command = [
        "psql",
        target,
        "-X",
        "-q",
        "-A",
        "-t",
        "-v",
        "ON_ERROR_STOP=1",
        *(["-c", sql] if sql else []),
    ]
    return await pod.run(command, env={"PGPASSWORD": "tangerine"}, stdin=stdin)
