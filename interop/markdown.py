"""Markdown that people read as text, too."""

import re
import textwrap
from collections.abc import Iterable

WIDTH = 100
_WHOLE = ("|", "#", "!", ">")  # tables, headings, pictures and quotes are one line each
_ITEM = re.compile(r"(\s*(?:[-*]|\d+\.) )?")


def wrapped(lines: Iterable[str]) -> list[str]:
    """The lines of a document, those of prose and of lists wrapped at `WIDTH` characters.

    Args:
        lines: Without line ends; each paragraph and each item of a list is one.

    Returns:
        The same document; words that are longer stay whole, and so do blocks of code.
    """
    found: list[str] = []
    in_code = False
    for line in lines:
        fence = line.startswith("```")
        in_code ^= fence
        is_bold = line.startswith("**") and line.endswith("**")  # a heading of a part
        if fence or in_code or is_bold or line.startswith(_WHOLE) or len(line) <= WIDTH:
            found.append(line)
            continue
        marker = _ITEM.match(line)
        found += textwrap.wrap(
            line,
            WIDTH,
            subsequent_indent=" " * len(marker[0] if marker else ""),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return found
