"""Reads rows of the workers' array files, without loading them whole and without torch."""

import json
import math
import os
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "BOOL": "?"}


class Tensors:
    """The tensors of an open safetensors file: https://huggingface.co/docs/safetensors, "Format"."""

    def __init__(self, file: IO[bytes]) -> None:
        size = int.from_bytes(_exactly(file, 8), "little")
        self._file = file
        self._header: dict[str, Any] = json.loads(_exactly(file, size))
        self._data = 8 + size

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def length(self, name: str) -> int:
        return int(self._header[name]["shape"][0])

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor; all of them must exist."""
        entry = self._header[name]
        first = self._data + entry["data_offsets"][0]
        return _rows(self._file, first, np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), start, stop)

    def row(self, name: str, index: int) -> Array:
        return np.asarray(self.rows(name, index, index + 1)[0])


def npy_row(file: IO[bytes], index: int) -> Array:
    """One row of an open .npy file, which holds the array in C order."""
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran:
        raise ValueError("the array is stored by columns")
    return np.asarray(_rows(file, file.tell(), dtype, shape, index, index + 1)[0])


def _rows(file: IO[bytes], first: int, dtype: np.dtype[Any], shape: tuple[int, ...], start: int, stop: int) -> Array:
    if not 0 <= start <= stop <= shape[0]:
        raise IndexError(f"rows [{start}, {stop}) of {shape[0]}")
    width = dtype.itemsize * math.prod(shape[1:])
    file.seek(first + start * width, os.SEEK_SET)
    return np.frombuffer(_exactly(file, (stop - start) * width), dtype).reshape(stop - start, *shape[1:])


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise EOFError(f"{size} bytes were expected, {len(content)} are there")
    return content
