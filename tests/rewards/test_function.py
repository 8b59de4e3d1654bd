"""rewards/function.py: how a reward function's parameters are read, and what it cannot do to a run."""

import decimal
import gc
import locale
import logging
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune_kit.data.records import Prompt
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.rewards import limits
from finetune_kit.rewards.settings import RewardConfig
from finetune_kit.rewards.sources import Rewards, load_rewards
from finetune_kit.settings.schema import ModelConfig

QUESTIONS, ANSWERS = ["1+1", "2+2", "3+3"], ["2", "5", "six"]
TEXTS = [
    Prompt(
        f"r:{n}", [{"role": "user", "content": q}], metadata={"prompt": q, "answer": str(2 * n)}, completion=str(2 * n)
    )
    for n, q in enumerate(QUESTIONS, start=1)
]
TURNS = [
    Prompt(r.where, r.messages, metadata={**r.metadata, "prompt": [{"role": "user", "content": q}]})
    for r, q in zip(TEXTS, QUESTIONS, strict=True)
]
RIGHT = [1.0, 0.0, 0.0]
IDS = [[7], [8, 9], [10]]
STATE = SimpleNamespace(global_step=4)
Load = Callable[..., Rewards]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A reward file's text, and the name in it, as the rewards of a run on `records`."""

    def made(text: str, name: str = "score", records: list[Any] = TEXTS, timeout: float = 60.0) -> Rewards:
        (tmp_path / "mine.py").write_text(text)
        config = RewardConfig(sources=[f"{tmp_path / 'mine.py'}:{name}"], timeout=timeout)
        data: Any = SimpleNamespace(
            score=None, chat_template_kwargs={}, train_records=records[:2], held_out_records=records[2:]
        )
        return load_rewards(config, data, ModelConfig())

    return made


def scores(rewards: Rewards, records: list[Any] = TEXTS, **more: Any) -> list[float]:
    return rewards(QUESTIONS, ANSWERS, records, **{"completion_ids": IDS, "trainer_state": STATE, **more})[0]


OURS = "[float(c == r.completion) for c, r in zip(completions, records)]"
TRLS = "[float(c == a) for c, a in zip(completions, answer)]"


@pytest.mark.parametrize(
    "text",
    [
        f"def score(prompts, completions, records): return {OURS}",
        f"def score(records, completions, prompts): return {OURS}",
        f"def score(completions, records): return {OURS}",
        f"def score(*, records, prompts, completions): return {OURS}",
        f"def score(prompts, completions, records, /): return {OURS}",
        f"def score(prompts, completions, records, strict=True): assert strict; return {OURS}",
        f"def score(completions, answer, **kwargs): return {TRLS}",
        f"def score(prompts, completions, completion_ids, answer): assert completion_ids == IDS; return {TRLS}",
        f"def score(answer, completions): return {TRLS}",
        "def score(completions, **columns): return [c == a for c, a in zip(completions, columns['answer'])]",
        "def score(completions, prompts): return [c == str(2 * int(p[0])) for c, p in zip(completions, prompts)]",
        "def score(**kwargs): return [c == a for c, a in zip(kwargs['completions'], kwargs['answer'])]",
        "def score(completion_ids, **kwargs): return [float(ids == [7]) for ids in completion_ids]",
        f"async def score(completions, answer, **kwargs): return {TRLS}",
        "def score(completions, answer):\n    for c, a in zip(completions, answer): yield c == a",
        f"class score:\n    def __call__(self, completions, answer, **kwargs): return {TRLS}",
        f"class Judge:\n    async def __call__(self, completions, answer): return {TRLS}\nscore = Judge()",
        "import functools\ndef right(completions, answer, points, **kwargs):\n"
        "    return [points * (c == a) for c, a in zip(completions, answer)]\n"
        "score = functools.partial(right, points=1)",
        "def score(completions, answer, trainer_state, log_metric, log_extra):\n"
        "    assert trainer_state.global_step == 4; log_metric('mine', 1); log_extra('mine', completions)\n"
        f"    return {TRLS}",
        "def score(completions, prompt, completion=(), completion_ids=None, difficulty='none'):\n"
        "    assert difficulty == 'none' and completion == ()\n"
        "    return [c == str(2 * int(p[0])) for c, p in zip(completions, prompt)]",
    ],
)
def test_each_way_to_write_the_two_signatures_is_called_right(load: Load, text: str) -> None:
    assert scores(load(f"IDS = {IDS}\n{text}")) == RIGHT


def test_trls_signature_gets_turns_where_the_rows_have_turns_and_ours_gets_texts(load: Load) -> None:
    trl = (
        "def score(prompts, completions, answer):\n"
        "    assert prompts[0] == [{'role': 'user', 'content': '1+1'}] and len(completions[0]) == 1\n"
        "    return [c[0]['content'] == a for c, a in zip(completions, answer)]"
    )
    assert scores(load(trl, records=TURNS), TURNS) == RIGHT
    by_column = OURS.replace("r.completion", "r.metadata['answer']")
    ours = f"def score(prompts, completions, records): return {by_column}"
    assert scores(load(ours, records=TURNS), TURNS) == RIGHT


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def score(p, c, r): pass", "takes (p, c, r); p and c and r: no column of the rows (prompt, answer)"),
        ("def score(prompt, completion): pass", "completion: no column"),
        ("def score(completions, solution, **kwargs): pass", "solution: no column of the rows (prompt, answer)"),
        ("def score(completions, records, answer): pass", "beside records there is no answer"),
        ("def score(prompts): pass", "never sees a completion"),
        ("def score(prompts, records): pass", "never sees a completion"),
        ("def score(*args): pass", "never sees a completion"),
        ("score = max", "has no signature that can be read"),
    ],
)
def test_any_other_signature_is_refused_at_start_with_both_spelled_out(load: Load, text: str, found: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(text)
    assert found in caught.value.message
    assert "def score(prompts, completions, records)" in caught.value.fix
    assert "def score(prompts, completions, completion_ids, **columns)" in caught.value.fix


ENDS = [
    ("import sys; sys.exit(0)", "called sys.exit(0)"),
    ("raise SystemExit", "called sys.exit(None)"),
    ("import os; os._exit(0)", "called os._exit(0)"),
    ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    ("raise GeneratorExit", "raised GeneratorExit"),
    ("raise BaseException('x')", "raised BaseException"),
    ("raise StopIteration", "raised StopIteration"),
]


@pytest.mark.parametrize(("line", "said"), ENDS)
def test_no_way_to_end_a_call_ends_the_run_unseen(load: Load, line: str, said: str) -> None:
    rewards = load(
        "def score(completions, **kwargs):\n"
        f"    if '5' in completions:\n        {line}\n    return [0] * len(completions)"
    )
    with pytest.raises(DataError, match="reward score") as caught:
        scores(rewards)
    assert said in caught.value.message
    assert "at r:2 (completion '5')" in caught.value.message


@pytest.mark.parametrize(("line", "said"), ENDS)
def test_no_way_to_end_the_import_does_either(load: Load, line: str, said: str) -> None:
    with pytest.raises(SettingsError, match="cannot be imported") as caught:
        load(line)
    assert said.removeprefix("raised ") in caught.value.message


@pytest.mark.parametrize(
    "wait",
    [
        "time.sleep(60)",
        "\n    while True: pass",
        "\n    while True:\n        try: time.sleep(9)\n        except Exception: pass",
        "signal.alarm(0); signal.setitimer(signal.ITIMER_REAL, 0); time.sleep(60)",
        "\n    signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.alarm(50)\n    while True: pass",
        "\n    signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "    while True: signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(9)",
    ],
)
def test_a_call_that_hangs_ends_with_the_setting_that_allows_it_more(load: Load, wait: str) -> None:
    rewards = load(f"import signal, time\ndef score(completions, **kwargs): {wait}", timeout=0.2)
    with pytest.raises(DataError, match=r"took more than reward\.timeout=0\.2 seconds") as caught:
        scores(rewards)
    assert "reward.timeout" in caught.value.fix
    with pytest.raises(SettingsError, match=r"took more than reward\.timeout=0\.2 seconds"):
        load("import time; time.sleep(60)", timeout=0.2)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


OWN_LIMIT = """
import signal, time
class TooSlow(Exception): pass
def too_slow(*_): raise TooSlow
{at_import}
def score(completions, **_):
    {before}
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        time.sleep(30)
    except TooSlow:
        return [0.5] * len(completions)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.mark.parametrize("where", ["at_import", "before"])
def test_a_time_limit_of_the_reward_s_own_works_in_every_call(
    load: Load, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits._say_left.cache_clear()
    places = {"at_import": "", "before": "", where: "signal.signal(signal.SIGALRM, too_slow)"}
    rewards = load(OWN_LIMIT.format(**places))
    assert scores(rewards) == [0.5, 0.5, 0.5]
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert scores(rewards) == [0.5, 0.5, 0.5]
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "note: a reward function left a handler of SIGALRM of its own"
    ]


def test_an_alarm_without_a_handler_is_an_error_and_not_the_end_of_the_process(load: Load) -> None:
    text = "import signal, time\ndef score(completions, **_):\n    signal.setitimer(signal.ITIMER_REAL, 0.02)\n"
    with pytest.raises(DataError, match=r"reward score set an alarm \(SIGALRM\) that went off"):
        scores(load(text + "    time.sleep(30)"))
    scores(load(text.replace("0.02", "0.3") + "    return [0] * len(completions)"))
    time.sleep(0.4)  # it was stopped


BENDS = """
import decimal, gc, locale, logging, logging.config, os, random, resource, signal, socket, sys, warnings, numpy, torch
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
def bend():
    logging.disable(logging.CRITICAL); logging.getLogger().setLevel(logging.ERROR); logging.getLogger().handlers.clear()
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})
    locale.setlocale(locale.LC_ALL, "C"); warnings.simplefilter("ignore"); warnings.showwarning = print
    signal.signal(signal.SIGUSR1, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setrecursionlimit(500); gc.disable(); os.umask(0); socket.setdefaulttimeout(1); sys.excepthook = print
    numpy.seterr(all="raise"); decimal.getcontext().prec = 3; torch.set_float32_matmul_precision("medium")
    torch.autograd.set_detect_anomaly(True); torch.set_autocast_enabled("cpu", True)
    torch.backends.cudnn.benchmark = True
    os.chdir("/"); random.seed(1); random.random(); numpy.random.seed(2); torch.manual_seed(3)
    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_num_threads(3)
    os.environ["BENT"] = "yes"; os.environ.pop("HOME", None); sys.path.append("/nowhere"); sys.stdout = None
    signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.alarm(1); signal.setitimer(signal.ITIMER_VIRTUAL, 9)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); resource.setrlimit(resource.RLIMIT_NOFILE, (99, HARD))
bend()
def score(prompts, completions, records):
    assert os.environ["BENT"] == "yes"  # its own, still
    bend()
    for record in records:
        record.messages.clear(); record.metadata.clear()
    prompts.clear(); completions.clear()
    return [random.random() for _ in records]
"""


def state() -> list[Any]:
    return [
        Path.cwd(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), dict(os.environ),
        signal.getsignal(signal.SIGTERM), signal.getitimer(signal.ITIMER_REAL), [dict(r.metadata) for r in TEXTS],
        signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT), locale.setlocale(locale.LC_ALL),
        logging.root.manager.disable, logging.getLogger().level, list(logging.getLogger().handlers),
        logging.getLogger("finetune_kit").disabled, list(warnings.filters), warnings.showwarning, sys.excepthook,
        sys.getrecursionlimit(), gc.isenabled(), socket.getdefaulttimeout(), np.geterr(), decimal.getcontext().prec,
        torch.get_float32_matmul_precision(), torch.is_anomaly_enabled(), torch.is_autocast_enabled("cpu"),
        torch.backends.cudnn.benchmark, signal.getitimer(signal.ITIMER_VIRTUAL), signal.getsignal(signal.SIGALRM),
        signal.pthread_sigmask(signal.SIG_BLOCK, []), resource.getrlimit(resource.RLIMIT_NOFILE),
    ]  # fmt: skip


def test_what_a_reward_changes_of_the_process_and_of_the_rows_is_put_back_after_import_and_call(load: Load) -> None:
    before = state()
    rewards = load(BENDS)
    assert state() == before
    first = scores(rewards)
    assert state() == before
    with pytest.raises(DataError, match="ZeroDivisionError"):
        scores(load(BENDS.replace("return [", "return [1 / 0 * ")))
    assert state() == before
    assert first == scores(rewards)


def test_random_draws_of_a_reward_follow_from_the_step_alone(load: Load) -> None:
    rewards = load(
        "import random, torch\n"
        "def score(completions, **_): return [random.random() + float(torch.rand(())) for _ in completions]"
    )
    one, other = (SimpleNamespace(global_step=step) for step in (1, 2))
    first = scores(rewards, trainer_state=one)
    random.seed(9)
    assert scores(rewards, trainer_state=one) == first != scores(rewards, trainer_state=other)


def test_a_signal_from_outside_is_no_word_of_the_reward(load: Load) -> None:
    rewards = load("import time\ndef score(completions, **_): time.sleep(30)")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        scores(rewards)
    timer.join()


def test_a_reward_imports_the_modules_beside_it_at_once_and_in_a_call(load: Load, tmp_path: Path) -> None:
    for name in ("at_once_helper", "in_a_call_helper"):
        (tmp_path / f"{name}.py").write_text("one = 1.0")
    text = (
        "from at_once_helper import one\ndef score(completions, **_):\n    import in_a_call_helper as late\n"
        "    return [one + late.one for _ in completions]"
    )
    assert scores(load(text)) == [2.0, 2.0, 2.0]
