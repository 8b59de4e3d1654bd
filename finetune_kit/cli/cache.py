"""The command `cache`: what is kept below the user's cache folder, and clearing it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from finetune_kit.cli.options import Debug, out
from finetune_kit.system.terminal import format_bytes


def show_cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove the prepared rows that no command is using.")] = False,
    debug: Debug = False,
) -> None:
    """Prepared rows on disk: list or clear them.

    The next command on the same files and settings maps them and tokenises nothing.
    """
    from finetune_kit.data import prepared

    kept = prepared.sets()
    if clear:
        freed = prepared.clear(kept)
        out.print(f"{format_bytes(freed)} freed in {prepared.home()}", markup=False)
        kept = prepared.sets()
    for one in kept:
        used = datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        now = "in use" if one.in_use else f"last used {used}"
        out.print(f"{format_bytes(one.bytes):>10}  {now}  {one.what}", markup=False)
    most = prepared.most_bytes()
    bound = f"at most {format_bytes(most)} ({prepared.LIMIT})" if most else f"none are kept: {prepared.LIMIT}=0"
    total = format_bytes(sum(one.bytes for one in kept))
    out.print(f"{len(kept)} sets of prepared rows, {total}, {bound}, in {prepared.home()}", markup=False)
