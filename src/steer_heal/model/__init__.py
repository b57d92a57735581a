"""The model: weights, forward passes, decoding and steering hooks.

At its import bitsandbytes asks torch to compile four functions. The compiler alone takes seconds to import, on a CPU
nothing here calls them, and peft imports bitsandbytes in every process. So it is imported here first, with them as they
are.
"""

import torch


def _uncompiled(function=None, **_options):
    return function or (lambda later: later)


_compile, torch.compile = torch.compile, _uncompiled
try:
    import bitsandbytes  # noqa: F401
finally:
    torch.compile = _compile
