"""The runner of the smoke checks: one line each, and none stops the next."""

from __future__ import annotations

import functools
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from unittest import SkipTest

import torch

Check = Callable[[torch.device], str]  # device -> what was found, in a few words


def needs_gpu(check: Check) -> Check:
    """Skip a check on a machine without a GPU."""

    @functools.wraps(check)
    def checked(device: torch.device) -> str:
        if device.type != "cuda":
            raise SkipTest("needs a GPU")
        return check(device)

    return checked


def run(checks: Sequence[Check], device: torch.device) -> bool:
    """Make the checks in turn and print a line for each; return whether none failed."""
    failed = [check.__name__ for check in checks if not passes(check, device)]
    print("FAILED:", ", ".join(failed) or "nothing", flush=True)
    return not failed


def passes(check: Check, device: torch.device) -> bool:
    """Make one check and print PASS, FAIL or SKIP, its seconds, and what was found."""
    begun, word = time.monotonic(), "PASS"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            found = check(device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # errors of kernels surface here
        except SkipTest as reason:
            word, found = "SKIP", str(reason)
        except Exception as error:  # whatever it is, the next check is made
            word, found = "FAIL", _told(error)
        if device.type == "cuda":
            found += _left_behind(device)
    print(f"{word} {time.monotonic() - begun:6.1f}s {check.__name__}: {found}", flush=True)
    for text in sorted({_first_line(warning.message) for warning in seen}):
        print(f"       warned: {text}", flush=True)
    return word != "FAIL"


def _told(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename][-1]
    return f"{type(error).__name__}: {_first_line(error)} @ {own.filename}:{own.lineno}"


def _first_line(text: object) -> str:
    return (str(text).splitlines() or [""])[0][:220]


def _left_behind(device: torch.device) -> str:
    """Return to the default stream, where a failed check left another; report a broken context."""
    try:
        torch.cuda.set_stream(torch.cuda.default_stream(device))
    except RuntimeError as error:
        return f" | CONTEXT LOST: {_first_line(error)}"
    return ""
