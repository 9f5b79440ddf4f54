"""The base of every enumeration: words out of a fixed list, refused where they enter."""

from __future__ import annotations

import re
from enum import Enum
from typing import NoReturn

from chai_export.errors import UsageError


class UnknownChoiceError(UsageError, ValueError):
    """A word that is not in the list. Also a ValueError, as Enum and pydantic expect."""


class Choice(str, Enum):
    """A word that is one of a few. Members are equal to their words and print as them.

    ``Heads("chai")`` turns a word from outside into a member; ``Heads("some")`` raises
    :class:`UnknownChoiceError`, a UsageError that names the words there are.
    """

    __str__ = str.__str__

    @classmethod
    def words(cls) -> list[str]:
        """The words to choose from, in the order of their definition."""
        return [str(member) for member in cls]

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        what = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
        raise UnknownChoiceError(f"{what} is {value!r}; give one of: {', '.join(cls.words())}")
