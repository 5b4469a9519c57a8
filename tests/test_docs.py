"""Tests of the pages for readers: links and quoted figures are right, and generated pages are up to date."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import rqkernels

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/*.md", ".github/*.md")
    for path in ROOT.glob(pattern)
)


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def anchor_of(heading: str) -> str:
    """Return the anchor that GitHub gives a heading: lower case, punctuation gone, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors_of(text: str) -> set[str]:
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def section_of(text: str, anchor: str) -> str:
    """Return a page from the heading with this anchor to the next heading of its level or a higher one."""
    for heading in re.finditer(r"^(#+) (.*)$", text, re.MULTILINE):
        if anchor_of(heading[2]) == anchor:
            rest = text[heading.end() :]
            end = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.MULTILINE)
            return rest[: end.start()] if end else rest
    raise AssertionError(f"no heading has the anchor {anchor}")


def broken_links(page: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            found.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors_of(path.read_text()):
            found.append(f"{target}: there is no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b: c\n[1](#a-b-c) [2](#d) [3](other.md) [4](https://x.org) `[5](no.md)`\n")
    assert broken_links(page) == ["#d: there is no such heading", "other.md: there is no such file"]


def test_figures_stand_where_the_readme_links_to() -> None:
    """Each row of the table of figures: its bold numbers are in the linked page, in the linked section and case.

    The last words name the processor.
    """
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(
        r"^\| (.*\*\*.*) \| \[.*\]\(([\w/.]+)#([\w.-]+)\)(?:, `([\w-]+)`)?, [\w ]+ \|$", readme, re.MULTILINE
    )
    assert len(rows) == 3
    for claim, page, anchor, case in rows:
        text = section_of((ROOT / page).read_text(), anchor)
        if case:  # the rows of a table from the bold name of the case up to its floor
            text = re.search(rf"\*\*{re.escape(case)}\*\*:.*?\| floor", text, re.DOTALL)[0]
        numbers = re.findall(r"\*\*([\d.]+)[^*]*\*\*", claim)
        assert numbers
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", text), f"{number} is not in {page}#{anchor}"


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture


def test_the_page_of_commands_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run: python docs/generate_cli.py"


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rqkernels.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yaml")), ids=lambda p: p.stem)
def test_issue_forms_are_complete(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [element["id"] for element in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(element["attributes"]["label"] for element in form["body"])
