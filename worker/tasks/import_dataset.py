"""The task that fills a dataset from the hub: finds the split's files at the commit, downloads them one by one, and converts
their rows as those of an upload. What it makes is the same whoever makes it, and however often it was interrupted."""

import errno
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from tqdm.auto import tqdm

from service.datasets import choosing, storage
from service.datasets.convert import convert_rows
from service.datasets.files.several import open_several
from service.datasets.import_schemas import Choice, HubSource
from service.datasets.rows.forms import Form
from service.http.errors import ApiError
from service.settings import UploadSettings
from service.storage.tempdirs import temporary_directory
from worker.errors import ImportFailed, StorageFull, UnitError
from worker.tasks.hub_files import CARDS, MAX_CARD_BYTES, Split, find_split, readable
from worker.tasks.process import TaskContext

_TIMEOUT_SECONDS = 30


def run(context: TaskContext, input: dict[str, Any]) -> dict[str, Any]:
    """Publishes the rows, and returns what the dataset's row says of them.

    Raises:
        ImportFailed: the dataset, its config or its split is not there or cannot be used, or the hub does not answer.
    """
    asked = dict(input["hub"])
    commit = asked.pop("commit")
    source = HubSource.model_validate({name: value for name, value in asked.items() if name in HubSource.model_fields})
    limits = UploadSettings.model_validate(input["limits"])
    try:
        with temporary_directory() as folder:
            return _import(context, source, _choice(asked), commit, limits, input["dataset_id"], folder)
    except ApiError as error:  # what an upload would be answered
        raise ImportFailed(error.problem_code, error.detail, errors=error.errors) from error


def _choice(asked: Mapping[str, Any]) -> Choice | None:
    return Choice.model_validate(asked["preset"]) if "preset" in asked else None


def _import(
    context: TaskContext,
    source: HubSource,
    choice: Choice | None,
    commit: str,
    limits: UploadSettings,
    dataset_id: str,
    folder: Path,
) -> dict[str, Any]:
    hub = _Repository(context, source.id, commit, limits, folder)
    split = hub.split(source.config, source.split)
    options = source.row_options()
    with hub.files(split) as files:
        wanted = options.wanted if choice is None else choosing.wanted(options, choice)
        upload = open_several(files, wanted, limits, text=options.form is Form.TEXT, most=source.limit)
        if choice is not None:
            upload = choosing.only_chosen(upload, choice, limits.max_row_bytes)
        made = folder / "made"
        made.mkdir()
        content = convert_rows(upload, options, limits, made, source.on_bad_row, hub.report_rows)
    skipped_bytes = content.report.stat().st_size if content.report else 0
    storage.publish(context.store, content, dataset_id)
    return {
        "fingerprint": content.fingerprint,
        "row_count": content.row_count,
        "byte_count": content.byte_count,
        "sources": content.sources,
        "detected": content.detected,
        "skipped": content.skipped,
        "skipped_bytes": skipped_bytes,
        "read": {"config": split.config, "split": split.name, "files": hub.taken},
    }


class _Repository:
    """A dataset's repository at a commit. Of its files one at a time is on the disk."""

    def __init__(self, context: TaskContext, id: str, commit: str, limits: UploadSettings, folder: Path) -> None:
        self._context, self._id, self._commit, self._limits, self._folder = context, id, commit, limits, folder
        self._siblings: dict[str, RepoSibling] = {}
        self._rows = self._bytes = 0
        self._total: int | None = None
        self.taken: list[dict[str, Any]] = []

    def split(self, config: str | None, split: str | None) -> Split:
        """The files of the split, which are within the budget of an upload.

        Raises:
            ImportFailed: they are not, or there is no such split.
        """
        with _asking(self._id):
            info = HfApi().dataset_info(self._id, revision=self._commit, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        self._siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        tree = self._folder / "tree"
        tree.mkdir()
        for name in CARDS:
            if name in self._siblings:
                self._check_size(name, MAX_CARD_BYTES)
                self._download(name, tree)
        found = find_split(tree, readable(list(self._siblings)), config, split)
        sizes = [self._siblings[path].size for path in found.files]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        return found

    def _check_size(self, path: str, most: int) -> None:
        size = self._siblings[path].size
        if size is not None and size > most:
            raise ImportFailed(
                "upload_too_large",
                f"The file {path} has {size:,} bytes; at most {most:,} are read. Take a smaller split.",
            )

    @contextmanager
    def files(self, split: Split) -> Iterator[Iterator[tuple[IO[bytes], str]]]:
        """The files of the split with their paths, each downloaded when its turn comes and gone when the next one's does."""
        with ExitStack() as last:

            def each() -> Iterator[tuple[IO[bytes], str]]:
                for path in split.files:
                    last.close()
                    yield last.enter_context(self._fetch(path)), path

            yield each()

    def _fetch(self, path: str) -> IO[bytes]:
        """The file, open; its name in the folder is gone already, so that its bytes go when it is closed."""
        self._check_size(path, self._limits.max_bytes - self._bytes)
        before = self._bytes
        local = self._download(path, self._folder / "files")
        size = local.stat().st_size
        self._bytes = before + size
        if self._bytes > self._limits.max_bytes:
            raise ImportFailed(
                "upload_too_large",
                f"The files of the split have more than {self._limits.max_bytes:,} bytes; take a smaller one.",
            )
        file = local.open("rb")
        local.unlink()
        sha256, lfs = hashlib.file_digest(file, "sha256").hexdigest(), self._siblings[path].lfs
        if lfs is not None and lfs.sha256 != sha256:
            raise ImportFailed(
                "hub_unavailable", f"The hub delivered other bytes of {path} than it has.", retryable=True
            )
        self.taken.append({"path": path, "size": size, "sha256": sha256})
        self._report()
        return file

    def _download(self, path: str, into: Path) -> Path:
        repository = self

        class Counted(tqdm):  # type: ignore[misc]
            """Reports what was downloaded of this file; shows nothing."""

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **{**options, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                repository._bytes += int(n or 0)
                repository._report()
                return None

        with _asking(self._id):
            return Path(
                hf_hub_download(
                    self._id,
                    path,
                    repo_type="dataset",
                    revision=self._commit,
                    local_dir=into,
                    tqdm_class=Counted,
                )
            )

    def report_rows(self, rows: int) -> None:
        self._rows = rows
        self._report()

    def _report(self) -> None:
        self._context.report({"rows": self._rows, "bytes": self._bytes, "total_bytes": self._total})


@contextmanager
def _asking(id: str) -> Iterator[None]:
    """Turns whatever the hub's client raises into what the user is told.

    Raises:
        ImportFailed: there is no such dataset or commit; or, to be tried again, the hub does not deliver.
        StorageFull: the worker's temporary folder has no room.
    """
    try:
        yield
    except (UnitError, MemoryError):
        raise
    except (
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RemoteEntryNotFoundError,
    ) as error:  # gated ones are of the first
        raise ImportFailed(
            "dataset_not_found", f"The hub no longer has {id!r} at this commit, or a worker cannot access it."
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"{error.strerror}: the temporary folder of a worker. Free or add space.") from error
        raise ImportFailed(
            "hub_unavailable", f"The hub did not deliver {id!r} ({type(error).__name__}).", retryable=True
        ) from error
