"""Limits around a user's reward function: time, exits, and the state of the process that is put back."""

from __future__ import annotations

import contextlib
import decimal
import functools
import gc
import locale
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from finetune_kit.system.files import resource

log = logging.getLogger(__name__)


Result = TypeVar("Result")
# what tells the main thread that the time is up: no library uses it, and SIGALRM is for the function's own limits
CLOCK: Any = getattr(signal, "SIGRTMAX", getattr(signal, "SIGVTALRM", None))
TIMERS = [getattr(signal, name) for name in ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF") if hasattr(signal, name)]
OURS_ALONE = (signal.SIGINT, signal.SIGTERM)  # end a command whatever a reward makes of them


class Ended(Exception):  # what happened, not a kind of error
    """The function ended otherwise than by returning or raising an error; the text says how."""


class TimeIsUp(BaseException):
    """Passes every `except Exception` of the function."""


@dataclass
class Own:
    """What a reward's file changed of the process and finds again at every call: variables of the environment (None:
    taken out), and handlers of signals other than those that end a command."""

    environment: dict[str, str | None] = field(default_factory=dict)
    handlers: dict[int, Any] = field(default_factory=dict)


def contained(act: Callable[[], Result], limit: float, own: Own, folder: Path, seed: int | None = None) -> Result:
    """What `act` gives, the process left as it was: working folder, environment, random states, PyTorch's and NumPy's
    defaults, sys.path, output, logging, warnings, locale, resource limits, signal handlers and timers.

    `own`: what its file changed, which it finds again at every call. `folder`: where it may import from. `seed`: what
    the random states begin with in here. An exit becomes Ended: sys.exit, os._exit, KeyboardInterrupt and their like,
    and more than `limit` seconds; a signal from outside does not. Alarms and timers of its own neither replace that
    limit nor outlive the call. Code that never comes back to Python cannot be interrupted.
    """
    main = threading.current_thread() is threading.main_thread()
    came: list[int] = []  # signals from outside
    put_back, talk = _state(seed), _talk()
    environment = dict(os.environ)
    signals, running = _signals() if main else _no_signals, [True]
    _set_environment({**environment, **own.environment})
    sys.path.append(str(folder.resolve()))  # last: nothing in it hides a library
    leave, process = os._exit, os.getpid()

    def no_exit(code: int) -> None:
        if os.getpid() != process:  # a process that the function started ends as it likes
            leave(code)
        raise Ended(f"called os._exit({code})")

    def heed(number: int, frame: Any) -> None:
        came.append(number)
        heeded[number](number, frame)

    def alarmed(number: int, frame: Any) -> None:
        raise Ended("set an alarm (SIGALRM) that went off, and no handler for it")

    def time_is_up(number: int, frame: Any) -> None:
        if running:
            raise TimeIsUp

    clock = _Clock(limit, running) if main and CLOCK is not None else None
    heeded: dict[int, Any] = {int(number): signal.getsignal(number) for number in OURS_ALONE}
    set_here: dict[int, Any] = {}
    try:
        os._exit = no_exit  # type: ignore[assignment]
        if main:
            set_here |= {number: heed for number, before in heeded.items() if callable(before)}
            if hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
                set_here[signal.SIGALRM] = alarmed  # by itself it would end the process
            set_here |= own.handlers
        if clock:
            set_here[CLOCK] = time_is_up
        for number, handler in set_here.items():
            signal.signal(number, handler)
        if clock:
            clock.start()
        return act()
    except Exception:
        raise
    except TimeIsUp:
        raise Ended(f"took more than reward.timeout={limit:g} seconds") from None
    except BaseException as error:
        if came:
            raise
        code = f"({error.code!r})" if isinstance(error, SystemExit) else ""
        what = f"called sys.exit{code}" if code else f"raised {type(error).__name__}"
        raise Ended(what) from error
    finally:
        running.clear()
        if clock:
            clock.stop()
        left = signals(set_here, own)
        os._exit = leave
        after = dict(os.environ)
        changed = [name for name in {*environment, *after} if environment.get(name) != after.get(name)]
        own.environment.clear()
        own.environment.update({name: after.get(name) for name in changed})
        _set_environment(dict(environment))
        talk()
        put_back()
        if left:
            _say_left(", ".join(left))


class _Clock(threading.Thread):
    """Sends CLOCK to the main thread after `limit` seconds, and again every second should what it raises be caught."""

    def __init__(self, limit: float, running: list[bool]) -> None:
        super().__init__(daemon=True, name="reward.timeout")
        self.limit, self.running, self.over = limit, running, threading.Event()

    def run(self) -> None:
        wait = min(self.limit, threading.TIMEOUT_MAX)
        while not self.over.wait(wait):
            if self.running and sys.platform != "win32":
                signal.pthread_kill(threading.main_thread().ident or 0, CLOCK)
            wait = 1.0

    def stop(self) -> None:
        """Nothing is sent any more."""
        self.over.set()
        if self.ident is not None:
            self.join()


@functools.cache
def _say_left(what: str) -> None:
    log.warning(
        "note: a reward function left %s of its own; put back after every call, and reward.timeout holds all the same",
        what,
    )


def _set_environment(wanted: dict[str, Any]) -> None:
    for name in {*os.environ, *wanted}:
        value = wanted.get(name)
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value


def _state(seed: int | None) -> Callable[[], None]:
    """A function that puts back what is global and moves a run; random numbers are drawn from `seed` until then."""
    import numpy as np
    import torch

    folder, path, streams = Path.cwd(), list(sys.path), (sys.stdout, sys.stderr)
    plain, legacy = random.getstate(), np.random.get_state()
    drawn = torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    device, strict = torch.get_default_device(), torch.are_deterministic_algorithms_enabled()
    precision, anomaly = torch.get_float32_matmul_precision(), torch.is_anomaly_enabled()
    autocasts = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    errors, decimals = np.geterr(), decimal.getcontext().copy()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)

    def put_back() -> None:
        os.chdir(folder)
        sys.path[:] = path
        sys.stdout, sys.stderr = streams
        random.setstate(plain)
        np.random.set_state(legacy)
        torch.set_rng_state(drawn)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        if torch.are_deterministic_algorithms_enabled() != strict:
            torch.use_deterministic_algorithms(strict)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        torch.autograd.set_detect_anomaly(anomaly)
        for kind, on in autocasts.items():
            torch.set_autocast_enabled(kind, on)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        np.seterr(**errors)
        decimal.setcontext(decimals)

    return put_back


def _signals() -> Callable[[dict[int, Any], Own], list[str]]:
    """A function that puts back signals' handlers, which are blocked, and the timers; for the main thread.

    It is given what was set for the call, keeps what the function set besides as its `own`, and names what it left.
    """
    before = {int(number): signal.getsignal(number) for number in signal.valid_signals()}
    timers: dict[int, tuple[float, float]] = {}
    blocked = None
    if sys.platform != "win32":  # which has neither
        timers = {which: signal.getitimer(which) for which in TIMERS}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    began = time.monotonic()

    def put_back(set_here: dict[int, Any], own: Own) -> list[str]:
        left, passed = [], time.monotonic() - began
        if sys.platform != "win32":
            for which, (rest, again) in timers.items():  # first: one that goes off now finds the function's own handler
                now = signal.getitimer(which)
                if now[1] != again or abs(now[0] - max(rest - passed, 0.0)) > 0.5 or bool(now[0]) != bool(rest):
                    signal.setitimer(which, max(rest - passed, 1e-3) if rest else 0.0, again)
                    left.append("a timer")
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked or ())
        for number, handler in before.items():
            now_ = signal.getsignal(number)
            if number != CLOCK and now_ is not set_here.get(number, handler):
                left.append(f"a handler of {_name(number)}")
                if number not in OURS_ALONE and now_ is not None:
                    own.handlers[number] = now_
            if handler is not None and now_ is not handler:
                signal.signal(number, handler)
        return list(dict.fromkeys(left))

    return put_back


def _no_signals(set_here: dict[int, Any], own: Own) -> list[str]:
    return []


def _name(number: int) -> str:
    known = {int(one): one.name for one in signal.Signals}
    return known.get(number, f"signal {number}")


def _talk() -> Callable[[], None]:
    """A function that puts back how the process says things, and what bounds it."""
    root = logging.getLogger()
    named = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    # what logging.config.dictConfig disables, and basicConfig adds to
    loggers = [(one, one.level, one.disabled, one.propagate, list(one.handlers)) for one in (root, *named)]
    disabled, filters, show = logging.root.manager.disable, list(warnings.filters), warnings.showwarning
    words, recursion, mask = locale.setlocale(locale.LC_ALL), sys.getrecursionlimit(), os.umask(0o077)
    os.umask(mask)
    collects, hook, patience = gc.isenabled(), sys.excepthook, socket.getdefaulttimeout()
    kinds = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")] if resource else []
    bounds = {kind: resource.getrlimit(kind) for kind in kinds} if resource else {}

    def put_back() -> None:
        for one, level, off, propagate, handlers in loggers:
            one.setLevel(level)
            one.disabled, one.propagate, one.handlers[:] = off, propagate, handlers
        logging.disable(disabled)
        warnings.filters[:] = filters  # type: ignore[index]  # a list, whatever its stubs say
        warnings.showwarning = show
        warnings._filters_mutated()  # type: ignore[attr-defined]  # what tells its cache
        if locale.setlocale(locale.LC_ALL) != words:
            locale.setlocale(locale.LC_ALL, words)
        if hasattr(time, "tzset"):
            time.tzset()
        sys.setrecursionlimit(recursion)
        os.umask(mask)
        (gc.enable if collects else gc.disable)()
        sys.excepthook = hook
        socket.setdefaulttimeout(patience)
        for kind, (soft, hard) in bounds.items():
            now = resource.getrlimit(kind)  # type: ignore[union-attr]  # there are none without it
            if now != (soft, hard):  # the hard one cannot be raised again
                with contextlib.suppress(ValueError, OSError):
                    resource.setrlimit(kind, (_least(soft, now[1]), now[1]))  # type: ignore[union-attr]

    return put_back


def _least(soft: int, hard: int) -> int:
    """A soft limit within a hard one; -1 is no limit."""
    return soft if hard == -1 or (soft != -1 and soft <= hard) else hard
