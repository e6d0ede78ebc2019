"""What must be kept and yet not be read in the database (webhook secrets, answers that hold a key) is encrypted."""

import base64

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


class Unsealable(Exception):
    """It was sealed under another secret key (`WINNOW_SECRET_KEY` was changed), or altered."""


class Sealer:
    """Fernet (AES-128-CBC with HMAC-SHA256) under a key derived from the server's secret by HKDF-SHA256."""

    def __init__(self, secret_key: str) -> None:
        derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"winnow sealed values").derive(
            secret_key.encode()
        )
        self._fernet = Fernet(base64.urlsafe_b64encode(derived))

    def seal(self, value: bytes) -> bytes:
        return self._fernet.encrypt(value)

    def unseal(self, sealed: bytes) -> bytes:
        """The value.

        Raises:
            Unsealable: it is not ours, or not as we left it.
        """
        try:
            return self._fernet.decrypt(sealed)
        except InvalidToken as error:
            raise Unsealable("sealed under another secret key, or altered") from error
