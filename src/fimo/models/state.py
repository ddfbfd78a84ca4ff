"""Settings of the caller's thread that numbers must not depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def usual_state() -> Iterator[None]:
    """Run a block as outside of the caller's ``torch.inference_mode``, ``no_grad`` and ``autocast``.

    Under the first nothing has a derivative; under the last scores would be those of another precision, and
    only of what runs on the caller's thread. A protocol's own ``autocast`` is set within.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
