"""Why some of the changes that `make mutants` makes cannot be noticed by any test."""

from __future__ import annotations

EXPLAINED: dict[tuple[str, str], str] = {}
"""By module and the line as it stands in the code, without its indent."""
