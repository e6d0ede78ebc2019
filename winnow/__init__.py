"""What users install and import: the client of the service, the command line, and the verification of downloads.

It imports nothing of `service` and `worker`, and needs none of their dependencies.
"""

from winnow.client import AsyncWinnow, JobFailed, Unreachable, Winnow, WinnowError
from winnow.importing import ImportFailed
from winnow.uploading import UploadProgress

__all__ = ["AsyncWinnow", "ImportFailed", "JobFailed", "Unreachable", "UploadProgress", "Winnow", "WinnowError"]
