"""The script that watches the memory of another process."""

import pytest

from ptq.errors import PTQError
from tests.test_scripts import script


def test_it_sees_the_memory_of_a_process_at_its_largest() -> None:
    code = "import time; x = bytearray(b'1') * 200_000_000; time.sleep(0.3); del x; time.sleep(0.1)"
    seen = script("bench_memory").watched(["-c", code])
    assert 200 < seen["anonymous_mb"] < 260
    assert seen["resident_mb"] >= seen["anonymous_mb"]


def test_a_run_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(PTQError, match="something happened"):
        script("bench_memory").watched(["-c", "raise SystemExit('something happened')"])
