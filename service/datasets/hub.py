"""Which datasets of the Hugging Face Hub may be imported, and the commit that a revision is now."""

import re
from fnmatch import fnmatchcase

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from service.datasets.import_schemas import HubSource
from service.http.errors import Unavailable, Unprocessable
from service.settings import DatasetSettings

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_TIMEOUT_SECONDS = 10


def is_allowed(id: str, settings: DatasetSettings) -> bool:
    """Whether the operator lists the dataset."""
    return any(fnmatchcase(id, pattern) for pattern in settings.hub)


def commit_of(source: HubSource, settings: DatasetSettings) -> str:
    """The commit of the source's revision. Asks the hub: call it while no transaction is open.

    Raises:
        Unprocessable: it is not allowed, or the hub has none; `param` names the field.
        Unavailable: the hub does not answer.
    """
    if not is_allowed(source.id, settings):
        allowed = "some datasets of the hub, but not this one" if settings.hub else "no datasets of the hub"
        raise Unprocessable(
            f"{source.id!r} is not allowed: this server imports {allowed}. Its operator can allow it with the setting"
            " WINNOW_DATASETS__HUB; or download it and upload its file.",
            param="hub.id",
            code="dataset_not_allowed",
        )
    if not _REVISION.fullmatch(source.revision) or ".." in source.revision:
        raise Unprocessable(
            f"{source.revision!r} is not a valid revision: use a branch, a tag, refs/pr/N or a commit.",
            param="hub.revision",
        )
    try:
        commit = HfApi().dataset_info(source.id, revision=source.revision, timeout=_TIMEOUT_SECONDS).sha
    except HFValidationError as error:
        raise Unprocessable(f"{source.id!r} is not a hub id (owner/name).", param="hub.id") from error
    except RepositoryNotFoundError as error:  # gated ones are of this class
        raise Unprocessable(
            f"The hub has no dataset {source.id!r} that this server can access. If it is gated, its operator can accept its terms"
            " and set HF_TOKEN.",
            param="hub.id",
        ) from error
    except RevisionNotFoundError as error:
        raise Unprocessable(f"{source.id!r} has no revision {source.revision!r}.", param="hub.revision") from error
    except Exception as error:  # of the HTTP client, which is another one from version to version; or no JSON
        raise Unavailable(f"The hub is not available ({type(error).__name__}); retry later.", param="hub.id") from error
    if commit is None:
        raise Unavailable("The hub did not say which commit the revision is; retry later.", param="hub.revision")
    return commit
