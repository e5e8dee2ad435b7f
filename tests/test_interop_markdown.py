"""Documents are wrapped where people read prose, and nowhere else."""

from __future__ import annotations

from interop.markdown import WIDTH, wrapped

LONG = "word " * 40 + "end"


def test_prose_is_wrapped_and_keeps_its_words():
    lines = wrapped([LONG])
    assert len(lines) > 1
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(lines) == LONG


def test_an_item_is_indented_below_its_marker():
    for marker in ("- ", "  - ", "12. "):
        first, *rest = wrapped([marker + LONG])
        assert first.startswith(f"{marker}word")
        assert rest
        assert {line[: len(marker) + 1] for line in rest} == {
            " " * len(marker) + rest[0].strip()[0]
        }


def test_what_is_one_line_stays_one():
    table, heading, picture = f"| {LONG} |", f"# {LONG}", f"![{LONG}](x)"
    code = ["```bash", LONG, "```"]
    lines = [table, heading, picture, f"**{LONG}**", *code, "-" * 2 * WIDTH, ""]
    assert wrapped(lines) == lines


def test_prose_after_code_is_prose_again():
    assert len(wrapped(["```", "```", LONG])) > 3
