"""What users install and import: the client of the service, the command line, and the verification of downloads.

It imports nothing of `service` and `worker`, and needs none of their dependencies.
"""

from winnow.client import AsyncWinnow, Winnow
from winnow.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    NoAddress,
    NotFound,
    RateLimited,
    ServiceError,
    Unauthorized,
    UnexpectedAnswer,
    Unreachable,
    WinnowError,
)
from winnow.handles import AsyncJob, AsyncResults, Job, Results
from winnow.importing import ImportFailed
from winnow.job_calls import JobFailed
from winnow.uploading import UploadProgress

__all__ = [
    "AsyncJob",
    "AsyncResults",
    "AsyncWinnow",
    "Conflict",
    "Forbidden",
    "ImportFailed",
    "InvalidRequest",
    "Job",
    "JobFailed",
    "NoAddress",
    "NotFound",
    "RateLimited",
    "Results",
    "ServiceError",
    "Unauthorized",
    "UnexpectedAnswer",
    "Unreachable",
    "UploadProgress",
    "Winnow",
    "WinnowError",
]
