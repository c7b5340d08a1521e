"""A check of $XLA_FLAGS, since XLA aborts a process with a flag that it does not know."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from knet_jax.system.errors import UserError


@contextmanager
def known_xla_flags() -> Iterator[None]:
    """Tries $XLA_FLAGS in another process meanwhile: XLA aborts the one in which it does not know one.

    Raises:
        UserError: it does not know one.
    """
    if "XLA_FLAGS" not in os.environ or "jax" in sys.modules:
        yield
        return
    trial = subprocess.Popen(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    yield
    _, said = trial.communicate()
    reason = re.search(r"^[EF]\d+ .*?\] (.*)", said, re.MULTILINE)
    if trial.returncode and reason:
        raise UserError(f"XLA_FLAGS={os.environ['XLA_FLAGS']}: {reason[1]}")
