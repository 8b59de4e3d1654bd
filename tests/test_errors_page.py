"""docs/errors.md names messages that there are."""

import re

from tests.fixtures_cli import ROOT

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
# adjacent literals of one message are one text
CODE = "\n".join(
    re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
    for path in sorted([*(ROOT / "finetune_kit").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
)


def test_every_message_of_the_page_stands_in_the_code() -> None:
    messages = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert len(messages) > 45
    parts = [part.strip() for message in messages for part in message.split("…") if len(part.strip()) > 2]
    assert [part for part in parts if part not in CODE] == []
