"""The student: gated adapters and their history."""

import steer_heal.model  # noqa: F401  must precede peft, see there
