"""The one exception for mistakes a user can make: the command line prints it and exits with code 2."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence


class UserError(ValueError):
    """Bad input, told in one sentence that names the file or argument and what to do."""


class ImageError(UserError):
    """Of some images of a batch, which whoever made the batch can name."""

    def __init__(self, message: str, images: Sequence[int]):
        """images: their places in the batch, from 0."""
        super().__init__(message)
        self.images = images


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 3, 8, 8, 80, 80


def shown(value: object) -> str:
    """What a file holds as part of a sentence: one line, and text as it is where it can be printed.

    Lists and dicts are cut in length and depth: of those nested a thousand deep `repr` cannot be had.
    """
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)
    return _SHORT.repr(value)
