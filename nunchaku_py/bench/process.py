"""Starting the process of a contender, asking it for turns, and ending it, whatever happens."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from ..errors import NunchakuError
from .job import TURN, Job

GRACE = 5.0  # seconds to end by itself
# In a process of its own everything is found where it is found here, a source tree that is not installed included.
START = "import sys; sys.path[:] = {path!r}; from nunchaku_py.bench.worker import main; main()"
Told = Callable[[str], None]


class Failed(NunchakuError):
    """A contender that could not go on; the sentence is its answer."""


class Process:
    """One worker. `told` hears what it is doing."""

    def __init__(self, job: Job, told: Told) -> None:
        self.job, self.told = job, told
        self.errors = tempfile.TemporaryFile()  # a pipe that nobody reads would stop it
        # Threads that wait do not spin: they would take the time of the next one's turn. Nothing is ever downloaded.
        environment = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **os.environ}
        self.child = subprocess.Popen(
            [sys.executable, "-c", START.format(path=sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env=environment, text=True, encoding="utf-8",
            start_new_session=True)  # Ctrl-C reaches this process, which ends that one
        self.ask(job.line())

    def ask(self, line: str) -> None:
        try:
            self.child.stdin.write(line + "\n")
            self.child.stdin.flush()
        except OSError as error:
            raise Failed(self.why_it_ended()) from error

    def answer(self, wanted: str) -> dict[str, Any]:
        """Waits for it; what is being done meanwhile is told."""
        for line in self.child.stdout:
            said = json.loads(line)
            if said["what"] == wanted:
                return said
            if said["what"] == "failed":
                raise Failed(sentence_of(said))
            self.told(said["sentence"])
        raise Failed(self.why_it_ended())

    def turn(self) -> dict[str, Any]:
        """Seconds of one step, and of one image where a pipeline makes it; what it has taken of memory by then."""
        self.ask(TURN)
        return self.answer("turned")

    def why_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(GRACE)
        code = self.child.poll()
        if code is not None and code == -getattr(signal, "SIGKILL", 0):  # Windows has none
            return "was killed by the system, most likely for lack of memory"
        if code is not None and code < 0:
            return f"crashed with signal {-code} ({signal.Signals(-code).name}){self.last_line()}"
        return f"ended unexpectedly with exit code {code}{self.last_line()}"

    def last_line(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:300]}" if lines else ""

    def close(self) -> None:
        """Ends it at once, if it still runs."""
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        if self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.child.kill()
        self.child.wait()
        self.child.stdout.close()
        self.errors.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sentence_of(said: dict[str, Any]) -> str:
    """Out of memory is said alike, whoever found it out."""
    known = said["error"] in ("NunchakuError", "MemoryError", "OutOfMemoryError")
    text = said["sentence"] if known else f"{said['error']}: {said['sentence']}"
    return f"out of memory ({text})" if "Memory" in said["error"] else text


def result_of(job: Job, wanted: str, told: Told) -> dict[str, Any]:
    """Of a process that answers once."""
    with Process(job, told) as process:
        return process.answer(wanted)
