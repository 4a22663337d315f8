"""What the tests of the losses share."""

import pytest

from hf_calib.functional import reducing


@pytest.fixture(params=["at once", "in blocks"])
def blocks(request, monkeypatch):
    """A test runs with all rows in one block, and with two or three rows in each."""
    if request.param == "in blocks":
        monkeypatch.setitem(reducing.BLOCK_LOGITS, "cpu", 9)
