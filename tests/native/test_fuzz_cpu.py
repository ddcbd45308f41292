"""The CPU engines under the compiler's sanitizers: `make sanitize`."""
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make") or not shutil.which("c++"), reason="no make, or no C++ compiler")
def test_random_calls_leave_memory_alone_and_agree_with_the_model() -> None:
    done = subprocess.run(["make", "sanitize"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("portable: ") == 2 and "wrong" not in done.stdout
