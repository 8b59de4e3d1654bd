"""The python tool against programs that want out. None may read, write, start, send or signal anything."""

# ruff: noqa: E501  # a program a line

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_kit.errors import ResourceError
from finetune_kit.tools import sandbox
from finetune_kit.tools.sandbox import MOST_OUTPUT, run_python
from finetune_kit.tools.tool import ToolError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's own")

# What each prints where it got out. SECRET, TARGET, PORT, ABSTRACT, PARENT are put in: a file to read, one to write, a
# TCP port and an abstract socket that listen, the process of the tests.
HOSTILE = {
    "reads a file": "print('ESCAPED', open('SECRET').read())",
    "reads it by the system call": "import os; print('ESCAPED', os.read(os.open('SECRET', os.O_RDONLY), 99))",
    "reads it through io": "import io; print('ESCAPED', io.FileIO('SECRET').read())",
    "reads it through linecache": "import linecache; t = linecache.getlines('SECRET'); assert t; print('ESCAPED', t)",
    "lists a folder": "import os; print('ESCAPED', os.listdir('/'))",
    "looks a file up": "import os; print('ESCAPED', os.stat('SECRET').st_size)",
    "follows the root by proc": "print('ESCAPED', open('/proc/PARENT/root/SECRET').read())",
    "reads its own environment": "import os; assert 'SANDBOX_CANARY' in os.environ; print('ESCAPED')",
    "reads the environment by proc": "print('ESCAPED', open('/proc/self/environ').read())",
    "reads the parent's environment": "print('ESCAPED', open('/proc/PARENT/environ').read())",
    "reads the parent's memory": "print('ESCAPED', open('/proc/PARENT/mem', 'rb').read(1))",
    "writes a file": "open('TARGET', 'w').write('x'); print('ESCAPED')",
    "makes a folder": "import os; os.mkdir('TARGET'); print('ESCAPED')",
    "makes a link": "import os; os.symlink('SECRET', 'TARGET'); print('ESCAPED')",
    "makes a pipe file": "import os; os.mkfifo('TARGET'); print('ESCAPED')",
    "deletes a file": "import os; os.unlink('SECRET'); print('ESCAPED')",
    "renames a file": "import os; os.rename('SECRET', 'TARGET'); print('ESCAPED')",
    "changes a file's rights": "import os; os.chmod('SECRET', 0o777); print('ESCAPED')",
    "truncates a file": "import os; os.truncate('SECRET', 0); print('ESCAPED')",
    "changes the folder": "import os; os.chdir('/tmp'); print('ESCAPED')",
    "changes the root": "import os; os.chroot('/tmp'); print('ESCAPED')",
    "looks for handles": "import os\nfor n in range(3, 1024):\n  try: os.write(n, b'x'); print('ESCAPED', n)\n  except OSError: pass",
    "copies a handle": "import os; print('ESCAPED', os.dup(1))",
    "makes a pipe": "import os; print('ESCAPED', os.pipe())",
    "makes memory a file": "import os; print('ESCAPED', os.memfd_create('x'))",
    "runs a shell": "import os; code = os.system('echo x > TARGET'); assert code == 0; print('ESCAPED')",
    "replaces itself": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "spawns": "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'echo ESCAPED'], {}); print('ESCAPED')",
    "forks": "import os; print('ESCAPED', os.fork())",
    "forks without end": "import os\nwhile True:\n  os.fork()\n  print('ESCAPED')",
    "starts threads": "import _thread; print('ESCAPED', _thread.start_new_thread(print, ()))",
    "imports subprocess": "import subprocess; print('ESCAPED', subprocess.run(['id'], capture_output=True))",
    "imports a socket": "import _socket; _socket.socket().connect(('127.0.0.1', PORT)); print('ESCAPED')",
    "connects by C": (
        "import ctypes, struct; c = ctypes.CDLL(None); n = c.socket(2, 1, 0); assert n >= 0; print('ESCAPED')"
    ),
    "connects to an abstract socket by C": "import ctypes; n = ctypes.CDLL(None).socket(1, 1, 0); assert n >= 0; print('ESCAPED')",
    "calls the kernel by number": (
        "import ctypes; c = ctypes.CDLL(None)\nn = c.syscall(257, -100, b'SECRET', 0, 0); assert n >= 0; print('ESCAPED')"
    ),
    "calls the 32-bit kernel's way": (
        "import ctypes; c = ctypes.CDLL(None)\nn = c.syscall(0x40000000 + 2, b'SECRET', 0, 0); assert n >= 0; print('ESCAPED')"
    ),
    "uses io_uring": "import ctypes; n = ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(200)); assert n >= 0; print('ESCAPED')",
    "traces the parent": "import ctypes; n = ctypes.CDLL(None).ptrace(16, PARENT, 0, 0); assert n >= 0; print('ESCAPED')",
    "reads another process": (
        "import ctypes; n = ctypes.CDLL(None).syscall(310, PARENT, 0, 0, 0, 0, 0); assert n >= 0; print('ESCAPED')"
    ),
    "makes code": "import ctypes; m = ctypes.CDLL(None).mmap\nm.restype = ctypes.c_long\n"
    "n = m(None, ctypes.c_size_t(4096), 7, 0x22, -1, 0); assert n != -1; print('ESCAPED')",
    "makes data code": "import ctypes; b = ctypes.create_string_buffer(8192)\n"
    "a = (ctypes.addressof(b) + 4095) & ~4095\n"
    "n = ctypes.CDLL(None).mprotect(ctypes.c_void_p(a), ctypes.c_size_t(4096), 7); assert n == 0; print('ESCAPED')",
    "loads a library": "import ctypes; print('ESCAPED', ctypes.CDLL('libz.so.1'))",
    "calls back through ctypes": "import ctypes; f = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1); import os\nos.open('SECRET', 0); print('ESCAPED')",
    "undoes no_new_privs": "import ctypes; n = ctypes.CDLL(None).prctl(38, 0, 0, 0, 0); assert n == 0; print('ESCAPED')",
    "takes seccomp off": "import ctypes; n = ctypes.CDLL(None).prctl(22, 0, 0, 0, 0); assert n == 0; print('ESCAPED')",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)); print('ESCAPED')",
    "unshares": "import ctypes; n = ctypes.CDLL(None).unshare(0x10000000); assert n == 0; print('ESCAPED')",
    "mounts": "import ctypes; n = ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None); assert n == 0; print('ESCAPED')",
    "kills the parent": "import os; os.kill(PARENT, 0); print('ESCAPED')",
    "kills everyone": "import os; os.kill(-1, 0); print('ESCAPED')",
    "kills its group": "import os; os.killpg(0, 0); print('ESCAPED')",
    "sets an alarm for another": "import signal; signal.pidfd_send_signal(3, 9); print('ESCAPED')",
    "CVE-2025-5120: a module of an allowed one": (
        "import statistics\no = next(m for m in vars(statistics).values() if getattr(m, '__name__', '') == 'random')\n"
        "print('ESCAPED', o._os.popen('id').read())"
    ),
    "CVE-2025-5120: through the import system": (
        "import sys; o = sys.modules['os']; print('ESCAPED', o.popen('cat SECRET').read())"
    ),
    "CVE-2025-9959: through subclasses": (
        "k = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]\n"
        "assert k.__init__.__globals__['system']('echo x > TARGET') == 0; print('ESCAPED')"
    ),
    "CVE-2025-9959: a class attribute by a lambda": (
        "f = (lambda: 0).__globals__['__builtins__']\nprint('ESCAPED', f.open('SECRET').read())"
    ),
    "through a traceback's frame": (
        "try: 1 / 0\nexcept ZeroDivisionError as e: frame = e.__traceback__.tb_frame.f_back\n"
        "print('ESCAPED', frame.f_globals['ctypes'].CDLL('SECRET'))"
    ),
    "through a format string": "print('ESCAPED', '{0.__class__.__base__.__subclasses__}'.format(1)) if open('SECRET') else 0",
    "through a new code object": (
        "def f(): pass\nf.__code__ = compile(\"open('SECRET').read()\", 'x', 'eval')\nprint('ESCAPED', f())"
    ),
    "through audit hooks": "import sys; sys.addaudithook(lambda *a: None); print('ESCAPED', open('SECRET').read())",
    "through the finder of modules": (
        "import sys; sys.path.append('/tmp'); from importlib.machinery import SourceFileLoader as L\n"
        "print('ESCAPED', L('x', 'SECRET').get_data('SECRET'))"
    ),
}  # fmt: skip
GREEDY = {
    "loops": ("while True: pass", "took more than"),
    "sleeps": ("import time; time.sleep(60)", "took more than"),
    "catches what it can": ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", "took more than"),
    "ignores signals": ("import signal; signal.signal(15, signal.SIG_IGN)\nwhile True: pass", "took more than"),
    "closes its pipes and continues": ("import os; os.close(1); os.close(2)\nwhile True: pass", "took more than"),
    "takes memory": ("x = bytearray(2 ** 32)", "MemoryError"),
    "takes memory by degrees": ("x = [0]\nwhile True: x += x", "MemoryError"),
    "writes without end": ("while True: print('x' * 1000)", "wrote more than"),
    "writes errors without end": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "wrote more than"),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "recurses in C": ("x = ()\nfor _ in range(10 ** 6): x = (x,)\nprint(repr(x))", "RecursionError"),
    "counts to a large power": ("print(len(str(9 ** 9 ** 9)))", "took more than"),
    "matches backwards": ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", "took more than"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "ended by signal 11"),
}  # fmt: skip
LIMIT = 3.0  # seconds; an honest program takes a tenth of that


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "secret").write_text("the secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0finetune-kit-{os.getpid()}")
        abstract.listen()
        server.setblocking(False)
        yield {
            "SECRET": str(folder / "secret"),
            "TARGET": str(folder / "target"),
            "PORT": str(server.getsockname()[1]),
            "PARENT": str(os.getpid()),
        }
        with pytest.raises(BlockingIOError):
            server.accept()


def put_in(program: str, world: dict[str, str]) -> str:
    for name, value in world.items():
        program = program.replace(name, value)
    return program


def said_by(program: str, seconds: float = LIMIT) -> str:
    try:
        return run_python(program, seconds)
    except ToolError as error:
        return str(error)


def test_of_62_hostile_programs_none_gets_out(world: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_CANARY", "x")
    assert len(HOSTILE) == 62
    with ThreadPoolExecutor(2) as pool:
        programs = [put_in(program, world) for program in HOSTILE.values()]
        said = dict(zip(HOSTILE, pool.map(lambda program: said_by(program, 20), programs), strict=True))
    assert {name: text for name, text in said.items() if "ESCAPED" in text} == {}
    assert {name: text for name, text in said.items() if "took more than" in text} == {}
    folder = Path(world["SECRET"]).parent
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert (folder / "secret").read_text() == "the secret"


@pytest.mark.parametrize("name", ["reads a file", "calls the kernel by number", "makes code", "starts threads", "kills the parent",
                                  "CVE-2025-5120: a module of an allowed one", "reads its own environment"])  # fmt: skip
def test_outside_the_sandbox_those_programs_do_get_out(
    name: str, world: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_CANARY", "x")
    if "number" in name and os.uname().machine != "x86_64":
        pytest.skip("the number is x86_64's")
    done = subprocess.run([sys.executable, "-c", put_in(HOSTILE[name], world)], capture_output=True, text=True)
    assert "ESCAPED" in done.stdout


@pytest.mark.parametrize("name", GREEDY)
def test_a_program_that_takes_too_much_is_ended_and_says_why(name: str) -> None:
    program, why = GREEDY[name]
    with pytest.raises(ToolError, match=why) as caught:
        run_python(program, 1.0 if "took" in why else 20.0)
    assert len(str(caught.value)) < 2 * MOST_OUTPUT


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("2 + 2", "4"), ("print('a')\n'b'", "a\nb"), ("x = 1", ""), ("import math\nmath.comb(50, 25)", "126410606437752"),
        ("from fractions import Fraction as F\nprint(F(1, 3) + F(1, 6))", "1/2"), ("'é' * 3", "ééé"), ("exit = 3", ""),
        ("import statistics as s; s.mean([1, 2])", "1.5"), ("import sys; sys.exit(0)", ""),
        ("import re, json, itertools, collections, datetime, decimal, random, string\n1", "1"),
        ("def f():\n    yield from range(3)\nlist(f())", "[0, 1, 2]"), ("class A: x = 1\nA.x", "1"),
    ],
)  # fmt: skip
def test_an_honest_program_prints_what_it_would_elsewhere(program: str, printed: str) -> None:
    assert run_python(program, 20.0) == printed


def test_an_error_comes_back_in_python_s_own_words_behind_what_was_printed() -> None:
    with pytest.raises(ToolError, match=r"(?s)^so far\nZeroDivisionError: division by zero$"):
        run_python("print('so far')\n1 / 0", 20.0)
    with pytest.raises(ToolError, match="SyntaxError"):
        run_python("print(1", 20.0)
    with pytest.raises(ToolError, match="No module named 'numpy'"):
        run_python("import numpy", 20.0)


def test_a_program_that_says_it_is_shut_in_does_not_hide_its_error() -> None:
    with pytest.raises(ToolError, match="ZeroDivisionError"):
        run_python("import sys; print('shut in', file=sys.stderr); 1 / 0", 20.0)


def test_where_the_system_cannot_shut_a_process_in_the_tool_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changed in ("'x86_64 is not known here'", "libc.syscall(444, None"):
        code = Path(sandbox.CHILD).read_text()
        code = (
            code.replace("platform.machine()", changed)
            if "known" in changed
            else code.replace(changed, "-1 + 0 * libc.syscall(444, None")
        )
        (tmp_path / "child.py").write_text(textwrap.dedent(code))
        monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
        with pytest.raises(ResourceError, match="no Landlock"):
            sandbox.python_tool()
        with pytest.raises(ToolError, match="no Landlock"):
            run_python("print('run all the same')", 20.0)
