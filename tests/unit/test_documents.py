"""The documents say what the code has, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.print_configuration import render

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "examples", "bench", "deploy")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/**/*.md"))]
# What npm installed for an example is others'.
PAGES = [page for page in PAGES if "node_modules" not in page.parts]


def test_the_page_on_configuration_is_current() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == render(), "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]
    missing = [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    missing += [
        target
        for target in targets
        if "#" in target and target.partition("#")[2] not in headings(page.parent / target.partition("#")[0], page)
    ]
    assert missing == []


def headings(linked: Path, page: Path) -> set[str]:
    """The anchors of a page's headings; of `page` itself where the link names no file."""
    file = linked if linked.is_file() else page
    found = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}
