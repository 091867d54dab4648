"""What every refusal of training is: one line, and exit code 2."""

from __future__ import annotations

import pytest

from dverge_serve.errors import UserError
from training.config import Data
from training.data.splits import load_training


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refusal(data: Data) -> str:
    """Return what is said of images that cannot be trained on."""
    with pytest.raises(UserError) as caught:
        load_training(data)
    return one_line(caught)
