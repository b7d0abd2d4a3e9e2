"""Blueprints made in a process of its own.

A thread would hold Python's lock while the loop launches kernels. The process is no child of
multiprocessing, which would import the caller's script again. It reads pickled requests from its
standard input and writes pickled answers to its standard output, and ends with its input.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from magi_sink_cp.dist.planning.blueprint import CPBlueprint, PlanInput, make_blueprint
from magi_sink_cp.dist.planning.mask import Window

Request = tuple[PlanInput, int, int, Sequence[Window], Sequence[tuple[Any, ...]]]


def make_ahead(request: Request) -> CPBlueprint:
    """The blueprint of (what, cp_size, rank, windows, what calls will ask)."""
    what, cp_size, rank, windows, asked = request
    blueprint = make_blueprint(what, cp_size, rank, windows)
    blueprint.prepare(asked)
    if asked:  # the schedules are there
        blueprint.forget_masks()
    return blueprint


class Worker:
    """The process, from the caller's side. One request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as worker; "
                "worker.main()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # Ctrl-C is for the loop; this ends with its input
        )
        self._ready = threading.Event()
        threading.Thread(target=self._wait_until_ready, daemon=True).start()

    def _wait_until_ready(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            pickle.load(self._output)
            self._ready.set()

    @property
    def is_ready(self) -> bool:
        """It has started, which takes as long as importing torch."""
        return self._ready.is_set()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def make(self, request: Request) -> CPBlueprint:
        """make_ahead in the process.

        Raises:
            RuntimeError: the process has died.
            Exception: what make_ahead raises.
        """
        with self._lock:
            try:
                pickle.dump(request, self._input)
                self._input.flush()
                answer = pickle.load(self._output)
            except (EOFError, OSError) as error:
                self.close()
                raise RuntimeError(
                    "the process that plans ahead has died, with exit code "
                    f"{self._process.poll()}; start the loop again"
                ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._input.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)

    def let_go(self) -> None:
        """In a forked process: leave the pipes to the parent, which alone may use and end them."""
        null = os.open(os.devnull, os.O_RDWR)
        for pipe in (self._input, self._output):
            os.dup2(null, pipe.fileno(), inheritable=False)  # what is buffered goes nowhere
        os.close(null)

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None, "opened as a pipe"
        return self._process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None, "opened as a pipe"
        return self._process.stdout


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until they end."""
    pickle.dump("ready", answers)
    answers.flush()
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        answer: CPBlueprint | Exception
        try:
            answer = make_ahead(request)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


def main() -> None:
    """The process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not stand among the answers
    with contextlib.suppress(BrokenPipeError):  # the caller has ended
        serve(sys.stdin.buffer, answers)
