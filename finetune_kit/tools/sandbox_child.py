"""What a sandboxed process runs: it gives up all rights, for good, and then runs the program that stdin holds.

Started by sandbox.py as a script of its own, with nothing of this package. First come the modules that a program may
use, while there is still a file system; then limits, Landlock (no file, no network, no signal to others) and seccomp (a
short list of system calls, by which nothing can be opened, connected, started or made executable). Where either
is missing it ends with code REFUSED before it reads anything. Source: man 2 seccomp, landlock(7), Linux 6.12.
"""

# ruff: noqa: F401
import array
import ast
import bisect
import builtins
import calendar
import cmath
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import heapq
import io
import itertools
import json
import linecache
import math
import numbers
import operator
import platform
import random
import re
import signal
import statistics
import string
import struct
import sys
import textwrap
import time
import traceback
import typing
import unicodedata

with contextlib.suppress(ImportError):  # Windows has none, and no sandbox
    import resource

REFUSED = 97
LARGEST_PROGRAM = 100_000
SYSTEM_CALLS = {  # machine: (its number in seccomp's data, what a program may do, each with its number)
    "x86_64": (
        0xC000003E,
        "read=0 write=1 close=3 fstat=5 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12 rt_sigaction=13 rt_sigprocmask=14 "
        "rt_sigreturn=15 mremap=25 madvise=28 nanosleep=35 getpid=39 exit=60 gettimeofday=96 sigaltstack=131 "
        "gettid=186 time=201 futex=202 clock_gettime=228 clock_getres=229 clock_nanosleep=230 exit_group=231 "
        "getrandom=318 rseq=334",
    ),
    "aarch64": (
        0xC00000B7,
        "close=57 lseek=62 read=63 write=64 fstat=80 exit=93 exit_group=94 futex=98 nanosleep=101 clock_gettime=113 "
        "clock_getres=114 clock_nanosleep=115 sigaltstack=132 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 "
        "gettimeofday=169 getpid=172 gettid=178 brk=214 munmap=215 mremap=216 mmap=222 mprotect=226 madvise=233 "
        "getrandom=278 rseq=293",
    ),
}
PROT_EXEC = 4
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # REFUSE: the call fails with EPERM


def give_up_rights(cpu_seconds: int, memory: int) -> str:
    """Why this process cannot be shut in; "" where it now is, and can never get out."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in SYSTEM_CALLS:
        return f"there is no Landlock and seccomp on {sys.platform} {machine}"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    libc.syscall.restype = ctypes.c_long
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: it dies with the process that started it
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(limit, (value, value))
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        return "PR_SET_NO_NEW_PRIVS is refused"
    return _landlock(libc) or _seccomp(libc, *SYSTEM_CALLS[machine])


def _landlock(libc: ctypes.CDLL) -> str:
    version = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))  # LANDLOCK_CREATE_RULESET_VERSION
    if version < 1:
        return "the kernel has no Landlock"
    files = (1 << (13, 14, 15, 15)[min(version, 4) - 1]) - 1 if version < 5 else (1 << 16) - 1
    network = 0b11 if version >= 4 else 0  # bind and connect of TCP
    scope = 0b11 if version >= 6 else 0  # abstract sockets and signals
    rules = struct.pack("QQQ", files, network, scope)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    # a rule set that allows nothing
    given = ctypes.create_string_buffer(rules, len(rules))
    handle = libc.syscall(444, given, ctypes.c_size_t(len(rules)), ctypes.c_uint(0))
    if handle < 0:
        return f"Landlock is refused (error {ctypes.get_errno()})"
    if libc.syscall(446, ctypes.c_int(handle), ctypes.c_uint(0)):
        return f"Landlock is refused (error {ctypes.get_errno()})"
    libc.close(handle)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # no more than stdin, stdout and stderr
    return ""


def _seccomp(libc: ctypes.CDLL, architecture: int, allowed: str) -> str:
    calls = {name: int(number) for name, number in (item.split("=") for item in allowed.split())}

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, has, give = 0x20, 0x15, 0x45, 0x06
    executable = [calls["mmap"], calls["mprotect"]]
    program = [op(load, 4), op(equal, architecture, 1, 0), op(give, KILL), op(load, 0)]
    # executable memory: only these two calls could give it, and their third argument says so
    for number in executable:
        program += [op(equal, number, 0, 4), op(load, 32), op(has, PROT_EXEC, 0, 1), op(give, REFUSE), op(give, ALLOW)]
    for number in sorted(set(calls.values()) - set(executable)):
        program += [op(equal, number, 0, 1), op(give, ALLOW)]
    program.append(op(give, REFUSE))
    code = ctypes.create_string_buffer(b"".join(program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    if libc.prctl(22, 2, ctypes.addressof(filter_), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        return f"seccomp is refused (error {ctypes.get_errno()})"
    return ""


def run(program: str) -> None:
    """Run it as a module of its own. As in a notebook, a last line that is an expression is printed."""
    names = {"__name__": "__main__", "__builtins__": builtins}
    try:
        tree = ast.parse(program)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "program", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "program", "eval"), names)
            if value is not None:
                print(value if isinstance(value, str) else repr(value))
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
    except BaseException as error:
        said = traceback.format_exception_only(error)
        print(*said[-1:], sep="", end="", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    refused = give_up_rights(int(sys.argv[1]), int(sys.argv[2]))
    if refused:
        print(refused, file=sys.stderr)
        sys.exit(REFUSED)
    del sys.argv[:], sys.path[:]
    sys.path_importer_cache.clear()
    print("shut in", file=sys.stderr, flush=True)
    run(sys.stdin.read(LARGEST_PROGRAM))
    sys.stdout.flush()
