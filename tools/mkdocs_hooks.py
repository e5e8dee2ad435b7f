"""What MkDocs needs to make a site of documents that are written for the repository.

`README.md`, `BUILD.md` and `CONTRIBUTING.md` become pages. Links to files outside of `docs/` lead
to the repository, and must exist. Pages that `mkdocs.yml` does not list are listed as well.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", "BUILD.md": "build.md", "CONTRIBUTING.md": "contributing.md"}
"""Documents outside of `docs/`, and the pages that they become."""
REST = "The layer"
"""The section of pages that the navigation does not name."""
RAW = "https://raw.githubusercontent.com/jax-moe/jax-moe/main/"


def on_config(config: Any) -> None:
    """Puts the pages of folders, and those that nobody listed, into the navigation."""
    config.nav = [_expanded(entry) for entry in config.nav]
    listed = set(_pages(config.nav))
    unlisted = [name for name in sorted(_documents()) if name not in listed]
    for entry in config.nav:
        if REST in entry:
            entry[REST] += unlisted


def on_files(files: Files, config: Any) -> Files:
    """Adds the documents that lie outside of `docs/`, and the pictures of the start page."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in _pictures((ROOT / "README.md").read_text()):
        files.append(File.generated(config, _asset(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turns the repository's links into those of the site.

    Raises:
        FileNotFoundError: A link leads nowhere.
    """
    source = pathlib.Path(page.file.abs_src_path)
    folder = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        return f"]({_moved(source, folder, target, config.repo_url)}{anchor})"

    for path in _pictures(markdown):
        markdown = markdown.replace(RAW + path, posixpath.relpath(_asset(path), folder or "."))
    # Fenced code stays as it is.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)", link, part) for part in parts[::2]]
    return "".join(parts)


def _moved(source: pathlib.Path, folder: str, target: str, repository: str) -> str:
    if target.startswith("assets/"):
        return target
    path = (source.parent / target).resolve()
    if not path.exists():
        raise FileNotFoundError(f"{source.name}: link to {target}, which does not exist")
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return posixpath.relpath(PAGES[name], folder or ".")
    if path.is_relative_to(DOCS):
        if path.is_dir():
            path = path / _index(path)
        return posixpath.relpath(path.relative_to(DOCS).as_posix(), folder or ".")
    return f"{repository}/{'tree' if path.is_dir() else 'blob'}/main/{name}"


def _pictures(text: str) -> list[str]:
    return re.findall(rf"!\[[^]]*\]\({re.escape(RAW)}([^)]+)\)", text)


def _asset(path: str) -> str:
    return f"assets/{path.replace('/', '_')}"


def _documents() -> list[str]:
    return [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]


def _index(folder: pathlib.Path) -> str:
    return "README.md" if (folder / "README.md").exists() else "index.md"


def _expanded(entry: Any) -> Any:
    """A navigation entry in which the names of folders stand for their pages, the index first."""
    if isinstance(entry, dict):
        ((title, value),) = entry.items()
        if isinstance(value, list):
            return {title: [_expanded(one) for one in value]}
        return {title: _pages_of(value)} if (DOCS / value).is_dir() else entry
    if not (DOCS / entry).is_dir():
        return entry
    return {entry.capitalize(): _pages_of(entry)}


def _pages_of(folder: str) -> list[str]:
    names = sorted(path.name for path in (DOCS / folder).glob("*.md"))
    first = _index(DOCS / folder)
    return [f"{folder}/{name}" for name in [first, *(n for n in names if n != first)]]


def _pages(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for value in values for page in _pages(value)]
