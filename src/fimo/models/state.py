"""Settings of the caller's thread, and other threads' calls, that numbers must not depend on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_CALLS = threading.RLock()


@contextlib.contextmanager
def one_call() -> Iterator[None]:
    """Run a block in the usual state, while calls of other threads wait.

    Networks hold other parameters, and hooks, while they are differentiated; torch's number of threads and
    its kernels of attention are the process's.
    """
    with _CALLS, usual_state():
        yield


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
