"""The site of docs/: every page is in the navigation, and every link leads somewhere."""

import importlib.util
import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT


class Loader(yaml.SafeLoader):
    """Reads past what is written in Python."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
BLOCK = re.compile(r"^```.*?^```|^ {4}[^\n]*$", re.MULTILINE | re.DOTALL)
WORDS = re.compile(r"`[^`\n]*`")


def pages_of(entries):
    """The pages of a navigation, in its order."""
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [value] if isinstance(value, str) else pages_of(value)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings}


def dead_links(document) -> list[str]:
    """The links of a document to files and headings that are not there."""
    dead = []
    plain = WORDS.sub("", BLOCK.sub("", document.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", plain):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        there = target.exists() and (not anchor or anchor in anchors(target.read_text()))
        dead += [] if there else [link]
    return dead


def test_the_navigation_has_every_page_once():
    assert sorted(pages_of(SITE["nav"])) == [page.name for page in PAGES]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document):
    assert dead_links(document) == []
    if document in PAGES:  # the site has nothing beside docs/
        assert "](../" not in document.read_text()


def test_a_dead_link_is_noticed(tmp_path):
    (tmp_path / "b.md").write_text(
        "# Two words (and `code`)\n\n    # no heading\n\n```\n# nor this\n```\n"
    )
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md#two-words-and-code) [2](b.md#no-heading) [3](b.md#nor-this) [4](c.md)\n\n"
        "    [5](d.md)\n`[6](e.md)`"
    )
    assert dead_links(page) == ["b.md#no-heading", "b.md#nor-this", "c.md"]


def test_the_functions_of_the_reference_exist():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/functions.md").read_text(), re.MULTILINE)
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = importlib.util.find_spec(module)
        assert found and (
            hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name)
        ), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Where `make site` has what it needs."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "synco_vit.load_encoder" in (tmp_path / "functions/index.html").read_text()
