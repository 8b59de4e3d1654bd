"""The command line. Thin: each command finds its parts, calls them and says what came out; heavy imports inside."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from finetune_kit import distributed
from finetune_kit import recipe as recipes
from finetune_kit.cli import cache, results, training
from finetune_kit.cli import recipes as recipe_commands
from finetune_kit.cli.options import Debug, out
from finetune_kit.errors import FinetuneKitError, SettingsError, Stopped
from finetune_kit.settings.aliases import COMMANDS, KNOWN_ELSEWHERE
from finetune_kit.system import signals, streams
from finetune_kit.system.terminal import Console, guard, quiet_libraries

app = typer.Typer(
    help="From a base model to an aligned one, with proof that it got better.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's own takes a tenth of a second to import
)


def main() -> NoReturn:
    """Run the command line; a user's mistake ends with its message and exit code, a bug of ours with its traceback.

    A signal ends it as that, whatever a library made of it on the way.
    """
    quiet_libraries()
    guard()
    streams.spell_out()
    signals.started()
    try:
        try:
            # without standalone mode a typer.Exit comes back as its code, and a command's end as None
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
            streams.check_written()
        except BaseException as error:
            if not signals.came or isinstance(error, Stopped):
                raise
            raise _stopped() from error
        if signals.came:
            raise _stopped()
        sys.exit(code)
    except FinetuneKitError as error:
        if distributed.fails_first(error.exit_code):
            if "--debug" in sys.argv:
                traceback.print_exc()
            _say_error(error.message, error.fix, "stopped" if isinstance(error, Stopped) else "error")
        sys.exit(error.exit_code)
    except Exception as error:  # typer's own usage errors carry their message and code
        if not distributed.fails_first(1):
            sys.exit(1)
        if isinstance(error, typer.Abort):
            _say_error("Nothing was answered.", "")
            sys.exit(1)
        if not hasattr(error, "format_message"):
            raise
        _say_error(error.format_message(), _meant(sys.argv[1:]))
        sys.exit(getattr(error, "exit_code", 2))
    except BaseException as error:
        # tokenizers' own; it is not an Exception. Its library ends a search that would take forever by such a panic
        if type(error).__name__ != "PanicException":
            raise
        if distributed.fails_first(SettingsError.exit_code):
            said = " ".join(str(error).split())[:200]
            _say_error(f"The tokenizer gave up on a text: {said}", "Take a tokenizer whose patterns end on any text.")
        sys.exit(SettingsError.exit_code)
    finally:
        signals.started(False)  # nothing is left to tidy up


def _stopped() -> Stopped:
    """The error of a command that a signal ended, where nothing that knows more has said so."""
    error = Stopped(f"by {signals.came[0]}", "Run the same command again." if signals.is_resumable() else "")
    error.exit_code = signals.exit_code()
    return error


def _meant(words: list[str]) -> str:
    """What a command line may have meant that typer cannot read: another tool's command or option."""
    command = "python -m finetune_kit"
    known = {item.name or getattr(item.callback, "__name__", "") for item in app.registered_commands}
    first = words[0] if words else ""
    if first and not first.startswith("-") and first not in known:
        rest = " ".join(words[1:])
        if first in recipes.BUILTIN or first.endswith((".py", ".yaml", ".yml")):
            return f"{command} run {first} {rest}".rstrip()
        near = COMMANDS.get(first.lower()) or next(iter(difflib.get_close_matches(first, known, n=1)), "")
        if near:
            return f"Did you mean {near}? {command} {near} {rest or '…'}"
    if first in ("run", "check", "show"):
        for at, word in enumerate(words):
            if word.startswith("--") and word.split("=")[0] not in ("--config", "--json", "--debug"):
                name, _, value = word[2:].partition("=")
                value = value or next(iter(words[at + 1 : at + 2]), "…")
                key = "model.name_or_path" if name == "model" else name.replace("-", "_")
                key = KNOWN_ELSEWHERE.get(key, key)
                return f"Settings are written key=value, such as {key}={value}. See: {command} show lora_sft"
    return f"Settings are written key=value. See: {command} --help"


def _say_error(message: str, fix: str, what: str = "error") -> None:
    said = Console(stderr=True, highlight=False, soft_wrap=True)
    said.print(f"{what}: ", style="bold red", end="")
    said.print(message, markup=False)
    if fix:
        said.print(fix, markup=False)


def doctor(debug: Debug = False) -> None:
    """Is this installation fit to train?

    Versions, known-bad combinations, devices, and one tiny run from end to end. Exit code 5 if something is wrong.
    """
    from finetune_kit.cli.doctor import examine

    if not examine(out):
        raise typer.Exit(5)


# in the order in which --help lists them
OFFERED: dict[str, Callable[..., None]] = {
    "list": recipe_commands.list_recipes,
    "show": recipe_commands.show,
    "copy": recipe_commands.copy_recipe,
    "check": training.check,
    "run": training.run,
    "evaluate": results.evaluate,
    "verify": results.verify,
    "generate": results.generate,
    "merge": results.merge,
    "diff": results.diff,
    "push": results.push,
    "cache": cache.show_cache,
    "doctor": doctor,
}
for name, command in OFFERED.items():
    app.command(name)(command)
