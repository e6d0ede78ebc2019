"""Log records: one line each, as text or as JSON, with what the code around them is about (a request, a job's unit)."""

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Any, TypeAlias

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from sqlalchemy.exc import StatementError

from service.observability.log_thread import LogThread
from service.observability.traces import trace_id
from service.settings import LogSettings

log = logging.getLogger(__name__)

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NOT_FIELDS = (*RESERVED_ATTRS, "color_message", "data")  # of uvicorn and celery: the message repeated for a terminal
# They log every successful call, some with signed URLs.
_QUIET = ("httpx", "httpx2", "httpcore", "urllib3", "botocore", "alembic")

_DETAIL = re.compile(r"DETAIL:.*?(?=\n\[SQL|\n\nThe above|\n\nDuring|\n[A-Z]+:|\Z)", re.DOTALL)
_ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

_bound: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default=MappingProxyType({}))


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Every record of this thread or task carries the fields until the block ends."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def context() -> dict[str, Any]:
    """What a record made here would carry: the bound fields, and the trace's id where there is a trace."""
    traced = trace_id()
    return {**_bound.get(), **({} if traced is None else {"trace_id": traced})}


class _WithoutValues(logging.Formatter):
    """Of a database error it shows what failed, not with which row: that may be a user's sample, or a key's digest."""

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        error, seen = ei[1], set()
        while error is not None and id(error) not in seen:  # `raise error from error` makes a circle
            seen.add(id(error))
            if isinstance(error, StatementError):
                error.hide_parameters = True
            error = error.__cause__ or error.__context__
        return _DETAIL.sub("DETAIL: (hidden)", super().formatException(ei))


class _Json(_WithoutValues, JsonFormatter):
    def __init__(self, process: Mapping[str, Any]) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(message)s",
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp=True,
            reserved_attrs=_NOT_FIELDS,
        )
        self._process = process

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        super().add_fields(log_data, record, message_dict)
        for name, value in {**self._process, **context()}.items():
            log_data.setdefault(name, value)


class _Text(_WithoutValues):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = " ".join(f"{name}={value}" for name, value in context().items())
        line = super().formatMessage(record).replace("\n", "\\n")  # a path may hold one, to forge a record
        return f"{line} [{fields}]" if fields else line


def configure(settings: LogSettings, *, in_thread: bool = False, **process: Any) -> None:
    """Sends every record of this process to stderr, those of uvicorn, celery, warnings and an uncaught error too.

    Args:
        in_thread: nobody who logs waits until it is written.
        process: fields that every JSON line of the process carries.
    """
    handler = LogThread() if in_thread else logging.StreamHandler()
    handler.setLevel(settings.level)  # loggers with their own level (uvicorn's) ignore the root's
    handler.setFormatter(_Json(process) if settings.format == "json" else _Text(_TEXT))
    logging.basicConfig(level=settings.level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # our own line says more, and shows no query
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("the process ends by an error", exc_info=(kind, error, trace))
