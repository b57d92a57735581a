"""Artefacts as JSON: dataclasses out and in. A key too many or too few is refused, what is None is left out."""

from __future__ import annotations

from typing import Any

from cattrs import Converter
from cattrs.errors import ForbiddenExtraKeysError

CONVERTER = Converter(forbid_extra_keys=True, omit_if_default=True, detailed_validation=False)


class Unfit(ValueError):
    """A record that is not of the kind that it should be of."""


def unstructured(record: Any) -> Any:
    """The record, or the list of records, as JSON has it. A field that may be left out is left out when it is None."""
    return CONVERTER.unstructure(record)


def structured(kind: Any, value: Any) -> Any:
    """The record of this kind that JSON has as `value`. Raises Unfit for a key that is missing or not known."""
    try:
        return CONVERTER.structure(value, kind)
    except (ForbiddenExtraKeysError, KeyError) as error:
        raise Unfit(f"no {getattr(kind, '__name__', kind)}: {error}") from error
