"""Encryption of values that must not be readable in the database: webhook secrets, responses that contain a key."""

import base64

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


class DecryptionError(Exception):
    """The value was encrypted with another secret key (`WINNOW_SECRET_KEY` was changed), or tampered with."""


class Encryptor:
    """Fernet (AES-128-CBC with HMAC-SHA256) under a key derived from the server's secret by HKDF-SHA256."""

    def __init__(self, secret_key: str) -> None:
        derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"winnow sealed values").derive(
            secret_key.encode()
        )
        self._fernet = Fernet(base64.urlsafe_b64encode(derived))

    def encrypt(self, value: bytes) -> bytes:
        return self._fernet.encrypt(value)

    def decrypt(self, encrypted: bytes) -> bytes:
        """Raises DecryptionError if the value was encrypted with another key, or tampered with."""
        try:
            return self._fernet.decrypt(encrypted)
        except InvalidToken as error:
            raise DecryptionError("encrypted with another secret key, or tampered with") from error
