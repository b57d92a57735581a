"""Convert artefacts to and from JSON. An unknown or missing key is refused; a field that is None is left out."""

from __future__ import annotations

from typing import Any

from cattrs import Converter
from cattrs.errors import ForbiddenExtraKeysError

CONVERTER = Converter(forbid_extra_keys=True, omit_if_default=True, detailed_validation=False)


class Unfit(ValueError):
    """A JSON value that is not a record of the expected kind."""


def unstructured(record: Any) -> Any:
    """Convert a record, or a list of records, to JSON values. An optional field is left out when it is None."""
    return CONVERTER.unstructure(record)


def structured(kind: Any, value: Any) -> Any:
    """Convert a JSON value to a record of this kind. Raises Unfit for a missing or unknown key."""
    try:
        return CONVERTER.structure(value, kind)
    except (ForbiddenExtraKeysError, KeyError) as error:
        raise Unfit(f"no {getattr(kind, '__name__', kind)}: {error}") from error
