"""The student: gated adapters and their history."""

import steer_heal.model  # noqa: F401  before peft, which imports bitsandbytes: see there
