"""What all episode records share on disk: one `.npz` of arrays and a JSON header, read without pickle.

Pictures are stored losslessly: the first as it is, every further one as its difference from the one before, modulo 256,
which compresses a still camera's pictures about four times better. A mask of tokens takes a bit per token.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGES = "images_"
"""An array of pictures is named by this and the camera's key."""
FOLDER = "records"
"""Where an output folder keeps its records."""


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a file, as they are stored.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: for what is no such archive, is damaged, or holds Python objects.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no episode record at {path}; lightvla eval --record True writes them, and lightvla serve --record FOLDER"
        )
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            with content:
                return dict(content)
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error)
        if not isinstance(error, OSError) and not zipfile.is_zipfile(path):
            reason = "not a whole .npz archive"
        elif "pickle" in reason:  # numpy's own message says how to load such a file, which might run code
            reason = "it holds Python objects, which records never do"
        raise ValueError(
            f"{path} is no episode record, or is damaged ({reason}); expected an .npz file that lightvla eval "
            "--record True wrote"
        ) from error


def read_header(path: Path, arrays: Mapping[str, NDArray[Any]], versions: Iterable[int]) -> dict[str, Any]:
    """What is no array, as JSON has it.

    Raises:
        ValueError: where there is no header, it is no JSON object, or its `format_version` is none of `versions`.
    """
    if "header" not in arrays:
        raise ValueError(f"{path} is no episode record: it has no header, only the arrays {sorted(arrays)}")
    try:
        header = json.loads(str(arrays["header"]))
        if (found := header.get("format_version")) not in versions:
            known = " and ".join(map(str, versions))
            raise ValueError(f"it has format version {found}, this code reads {known}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise unusable_header(path, str(error)) from error
    return header


def unusable_header(path: Path, reason: str) -> ValueError:
    """The error to raise for a header with something wrong in it."""
    return ValueError(f"the header of {path} is unusable: {reason}. Record the episode again")


def stated_version(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """The format version that a file's header states; None where it states none."""
    try:
        return json.loads(str(arrays["header"]))["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def refuse_objects(path: str | Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raises ValueError for arrays that only pickle could store."""
    if objects := [name for name, array in arrays.items() if array.dtype == object]:
        raise ValueError(f"{path}: the arrays {objects} hold Python objects, which only pickle could store")


def differences(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(L, H, W, 3) -> the same shape; `undone` gives the pictures back."""
    result = pictures.copy()
    result[1:] -= pictures[:-1]
    return result


def undone(stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Inverse of `differences`."""
    return np.cumsum(stored, axis=0, dtype=np.uint8)


def packed(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(L, V) -> (L, V / 8 rounded up)."""
    return np.packbits(mask, axis=1)


def unpacked(stored: NDArray[np.uint8], num_tokens: int) -> NDArray[np.bool_]:
    """Inverse of `packed`, for V tokens."""
    return np.unpackbits(stored, axis=1, count=num_tokens).astype(bool)


def check_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], axes: Mapping[str, int]) -> None:
    """Raises ValueError for arrays of other kinds or with other numbers of `axes` than are written."""
    for name, array in arrays.items():
        if name.startswith(IMAGES):
            fits, expected = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3, "uint8 (L, H, W, 3)"
        elif name in axes:
            kinds, expected = "u" if name == "kept" else "fiu", f"numbers with {axes[name]} axes"
            fits = array.dtype.kind in kinds and array.ndim == axes[name]
        else:
            continue
        if not fits:
            found = f"{array.dtype} {array.shape}"
            raise ValueError(f"{path}: {name} is {found}; expected {expected}. Record the episode again")
