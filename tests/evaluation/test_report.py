"""evaluation/report.py: the table on the terminal, and one HTML file that is escaped and needs no network."""

import io
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from finetune_kit.evaluation.charts import loss_curves, reward_frontier
from finetune_kit.evaluation.compare import compare
from finetune_kit.evaluation.function_calls import Called
from finetune_kit.evaluation.measure import Measurement
from finetune_kit.evaluation.report import print_report
from finetune_kit.evaluation.report_html import write_html
from finetune_kit.generation.generate import Call, Completion
from finetune_kit.settings.schema import EvaluateConfig

CALL = Call("calculator", {"expression": "6*7 <b>"}, "42 <i>", True, True, 0.1)
EVIL = '</script><script>alert("x")</script> [bold]not markup[/bold] & <img src=http://evil.example/x.png>'
HISTORY = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.0, "grad_norm": 1.0},
    {"step": 2, "eval_loss": 2.5},
    {"step": 3, "loss": math.nan},
    {"step": 4, "loss": 1.0},
    {"step": 4, "eval_loss": 2.0},
]
VOID = {"meta", "circle", "line", "polyline", "br"}


def a_report(text=EVIL, n=20):
    def measured(score, nll):
        return Measurement(
            metrics={"exact_match": [score] * n},
            nll=[nll] * n,
            tokens=[4] * n,
            general_nll=[9.0] * 35,
            general_tokens=[3] * 35,
            where=[f"held.jsonl:{row}" for row in range(n)],
            conversations=[text] * n,
            prompts=[text] * n,
            references=["expected " + text] * n,
            completions=[Completion([1], f"answer {score} {text}", score > 0)] * n,
            decoding={"do_sample": False, "max_new_tokens": 16},
            seconds=1.0,
        )

    return compare(measured(0.0, 8.0), measured(1.0, 4.0), EvaluateConfig(bootstrap_samples=50))


class Checker(HTMLParser):
    """Every tag closed in order; no script; no attribute that loads anything."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loads = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [
            name for name, _ in attrs if name in ("src", "href", "srcset", "action") or name.startswith("on")
        ]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    run = {
        "recipe": "lora_sft <b>",
        "settings": "model:\n  name_or_path: <i>x</i>\n",
        "ledger": {
            "train": {"rows": 10, "dropped": {"too <long>": 2}},
            "rows_not_kept_whole": [{"where": f"t.jsonl:{n}", "what": "dropped"} for n in range(25)],
        },
    }
    path = tmp_path / "report.html"
    write_html(a_report(), HISTORY, run, path)
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing_and_runs_nothing(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.loads == []
    assert "script" not in checker.tags
    assert "img" not in checker.tags
    assert not re.search(r"url\(|@import", page)


def test_all_text_of_the_user_is_escaped(page):
    assert "<script>" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(&quot;x&quot;)" in page
    for tag in ("<b>", "<i>", "<long>"):
        assert tag not in page


def test_the_page_holds_verdict_table_curves_samples_settings_and_ledger(page):
    assert '<p class="verdict better">Better: exact_match 0.000 → 1.000' in page
    assert "exact match ↑" in page
    assert "held-out loss, nats/token ↓" in page
    assert "20 won, 0 tied, 0 lost" in page
    assert page.count("<polyline") == 2
    assert page.count('class="sample"') == 8
    assert page.count("cut off") == 8  # before: not one answer ended by itself
    assert "name_or_path: &lt;i&gt;x&lt;/i&gt;" in page
    assert '<th scope="row">train.rows</th><td>10</td>' in page
    assert "t.jsonl:19 · dropped" in page
    assert "… and 5 more" in page


def test_where_memory_was_too_small_the_page_says_what_was_done(tmp_path):
    fallback = [
        {"step": 0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"step": 7, "per_device_train_batch_size": 2},
    ]
    texts = []
    for name, history in (("short", [*HISTORY, *fallback]), ("enough", HISTORY)):
        write_html(a_report(), history, {"recipe": "lora_sft"}, tmp_path / name)
        texts.append((tmp_path / name).read_text())
    assert "after step 0: 4 rows at once in 2 passes; after step 7: 2 rows at once." in texts[0]
    assert "Memory was too small" not in texts[1]


def test_the_page_fits_a_phone_and_follows_light_and_dark(page):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert "@media (max-width: 40rem)" in page


def test_curves_have_a_point_for_every_finite_loss_inside_the_frame():
    svg = loss_curves(HISTORY)
    training, held_out = re.findall(r'points="([^"]*)"', svg)
    assert len(training.split()) == 3
    assert len(held_out.split()) == 2
    for x, y in (map(float, point.split(",")) for point in (training + " " + held_out).split()):
        assert 0 <= x <= 480
        assert 0 <= y <= 230
    assert "nan" not in svg
    heights = [float(point.split(",")[1]) for point in training.split()]
    assert heights == sorted(heights)  # a falling loss goes down the page


@pytest.mark.parametrize(
    "history",
    [[], [{"step": 1, "loss": math.nan}], [{"step": 3, "loss": 2.0}], [{"step": n, "loss": 0} for n in (1, 2)]],
)
def test_curves_of_no_one_or_equal_losses_are_drawn_without_a_division_by_zero(history):
    svg = loss_curves(history)
    assert ("No loss was logged" in svg) == (not any(line["loss"] == line["loss"] for line in history))
    assert "nan" not in svg


def test_the_terminal_shows_table_verdict_and_3_samples_with_brackets_as_they_are():
    screen = io.StringIO()
    print_report(a_report("[bold]hi[/bold]"), Console(file=screen, width=120))
    shown = screen.getvalue()
    assert "exact match ↑" in shown
    assert "+1.000 [+0.663, +1.000]" in shown
    assert "Better: exact_match 0.000 → 1.000" in shown
    assert shown.count("answer 1.0") == 3
    assert "[bold]hi[/bold]" in shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_word_of_an_answer_is_broken_at_any_width_of_the_terminal(width: int) -> None:
    words = ["internationalization,", "characteristically,", "incomprehensibilities"]
    report = a_report(" ".join(words))
    screen = io.StringIO()
    print_report(report, Console(file=screen, width=width))
    shown = screen.getvalue()
    assert all(word in shown for word in words)
    assert ("side by side" in shown) == (width == 120)
    assert max(map(len, shown.splitlines())) <= width
    assert ("[+0.663, +1.000]" in shown) == (width >= 80)


def test_without_samples_the_terminal_shows_the_table_alone():
    report = a_report()
    report.samples = []
    screen = io.StringIO()
    print_report(report, Console(file=screen, width=80))
    assert "side by side" not in screen.getvalue()


def test_the_score_of_each_ppo_update_is_drawn_by_its_kl() -> None:
    history = [{"step": n, "objective/kl": float(n), "objective/scores": n / 10} for n in range(1, 4)]
    drawn = reward_frontier(history)
    assert drawn.count("<circle") == 3
    assert "update 2: KL 2.00, score 0.200" in drawn
    assert reward_frontier([{"step": 1, "loss": 0.5}]) == ""


def test_with_2_rewards_each_has_a_curve_of_its_own_so_that_a_fooled_one_shows() -> None:
    history = [
        {"objective/kl": float(n), "objective/scores": n / 10, "reward/judge": n / 10, "reward/task": 1 - n / 10}
        for n in range(1, 4)
    ]
    drawn = reward_frontier(history)
    assert drawn.count("<figure>") == 3
    assert "update 3: KL 3.00, reward/judge 0.300" in drawn
    assert "update 3: KL 3.00, reward/task 0.700" in drawn


def test_tools_have_a_section_and_each_sample_its_calls(tmp_path):
    def measured(score):
        return Measurement(
            with_tools=True,
            metrics={"exact_match": [score] * 40},
            bare={"exact_match": [0.0] * 40},
            wanted=[[{"name": "calculator", "arguments": {"expression": "6*7"}}]] * 30 + [[]] * 10,
            where=["held.jsonl:1"] * 40,
            conversations=["6 * 7?"] * 40,
            references=["42"] * 40,
            completions=[Completion([1], "It is 42.", True, [CALL])] * 40,
        )

    page = tmp_path / "report.html"
    write_html(
        compare(measured(0.0), measured(1.0), EvaluateConfig(bootstrap_samples=50)), HISTORY, {"recipe": "x"}, page
    )
    text = page.read_text(encoding="utf-8")
    Checker().feed(text)
    assert "<h2>Tools</h2>" in text
    assert "exact match, all rows" in text
    assert "exact match, rows that want a call" in text
    assert "<th>without tools</th><th>with tools</th>" in text
    assert "calculator({&quot;expression&quot;: &quot;6*7 &lt;b&gt;&quot;}) → 42 &lt;i&gt;" in text

    wants, made = [{"name": "area", "arguments": {"side": 3}}], [{"name": "area", "arguments": {"side": "<4>"}}]

    def called(right):
        row = Called("bfcl.jsonl:7", wants, wants if right else made, right, True, [True])
        return Measurement(nll=[1.0] * 20, tokens=[1] * 20, called=[row] * 20)

    write_html(
        compare(called(False), called(True), EvaluateConfig(bootstrap_samples=50)), HISTORY, {"recipe": "x"}, page
    )
    text = page.read_text(encoding="utf-8")
    Checker().feed(text)
    assert "calls right: names, arguments, types" in text
    assert "bfcl.jsonl:7" in text
    assert "area({&quot;side&quot;: &quot;&lt;4&gt;&quot;})" in text
