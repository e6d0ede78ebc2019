"""Renders rows with the caller's templates, in a separate process, since a template can loop and fill the memory.

The sandbox keeps a template from what is none of its business, not from taking time. So this process runs isolated
(`python -I`), without credentials, under limits on memory and processor time; its parent checks what it writes
(`service.datasets.rows.renderer`).

    stdin    a line of JSON: {"templates": {"user": ...}, "memory_bytes": ..., "base_seconds": ..., "seconds_per_byte": ...,
             "max_bytes": ..., "max_row_bytes": ...}; then chunks, each a line with a number and as many rows, lines of JSON
    stdout   a line {} once the templates are compiled, or {"problem": "..."}; then for each row {"user": ..., ...} or
             {"error": "..."}
    status   0 if that is all; ENOMEM if the memory did not suffice; any other is a crash. SIGXCPU: it took too much time
"""

import errno
import json
import math
import os
import resource
import sys
from contextlib import suppress
from typing import Any

_MAX_ERROR = 300


def _limit(kind: int, most: int, hardest: int | None = None) -> None:
    hard = resource.getrlimit(kind)[1]
    most, hardest = (limit if hard == resource.RLIM_INFINITY else min(limit, hard) for limit in (most, hardest or most))
    with suppress(ValueError, OSError):  # macOS has no limit on data
        resource.setrlimit(kind, (most, hardest))


class _Time:
    """The processor time that it may take: it grows with what has been read."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._base, self._per_byte = given["base_seconds"], given["seconds_per_byte"]
        self._most = math.ceil(self._base + self._per_byte * given["max_bytes"]) + 1
        self._bytes = 0
        self.grow(0)

    def grow(self, read: int) -> None:
        self._bytes += read
        _limit(resource.RLIMIT_CPU, math.ceil(self._base + self._per_byte * self._bytes), self._most)


class _Templates:
    def __init__(self, sources: dict[str, str], max_row_bytes: int) -> None:
        from jinja2 import StrictUndefined, UndefinedError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def no_null(value: object) -> object:
            if value is None:
                raise UndefinedError("a value that it prints is null")
            return value

        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=no_null, keep_trailing_newline=True, cache_size=0
        )
        self._most = max_row_bytes
        self._templates = {}
        for part, source in sources.items():
            try:
                self._templates[part] = environment.from_string(source)
            except Exception as error:  # a filter that is not there, or a constant that cannot be computed
                raise ValueError(f"{part}: {_shortened(error)}") from error

    def rendered(self, row: dict[str, Any]) -> dict[str, str]:
        made, room = {}, self._most
        for part, template in self._templates.items():
            pieces = []
            try:
                for piece in template.generate({"row": row, **row}):
                    pieces.append(piece)
                    room -= len(piece)
                    if room < 0:
                        return {"error": f"template.{part} makes more than {self._most:,} characters of this row"}
            except Exception as error:
                return {"error": f"template.{part}: {_shortened(error)}"}
            made[part] = "".join(pieces)
        return made


def _shortened(error: Exception) -> str:
    """In ASCII: it may quote the row."""
    text = "it takes too much memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
    return json.dumps(text[:_MAX_ERROR])[1:-1].replace('\\"', '"')


def _serve() -> None:
    with open(0, "rb", closefd=False) as source, open(1, "wb", closefd=False) as out:

        def say(answer: dict[str, str]) -> None:
            out.write(json.dumps(answer).encode() + b"\n")

        given = json.loads(source.readline())
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_DATA, given["memory_bytes"])
        time = _Time(given)
        try:
            templates = _Templates(given["templates"], given["max_row_bytes"])
        except ValueError as error:
            say({"problem": str(error)})
            return
        say({})
        out.flush()
        while count := source.readline():
            # All of them before the first is answered: the parent reads no answer while it writes.
            lines = [source.readline() for _ in range(int(count))]
            time.grow(sum(map(len, lines)))
            for line in lines:
                say(templates.rendered(json.loads(line)))
            out.flush()


def main() -> None:
    status = 0
    try:
        _serve()
    except MemoryError:
        status = errno.ENOMEM
    except BrokenPipeError:  # the parent has stopped reading
        pass
    sys.stderr.flush()
    os._exit(status)  # an ordinary exit might need memory


if __name__ == "__main__":
    main()
