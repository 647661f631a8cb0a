"""What the documentation says about the code."""

from helpers import ROOT

from data.transfer import markdown_table

README = (ROOT / "README.md").read_text()


def test_the_table_of_data_sets_is_the_codes():
    assert markdown_table().strip() in (ROOT / "docs/data.md").read_text()


def test_the_readme_can_be_read_in_one_go():
    assert len(README.splitlines()) < 200


def test_every_recipe_and_script_that_the_readme_names_exists():
    named = [word.strip("`,.;:()") for line in README.splitlines() for word in line.split()]
    paths = {w for w in named if w.endswith((".py", ".yaml", ".md")) and "{" not in w}
    assert len(paths) > 8
    assert [p for p in sorted(paths) if not (ROOT / p).exists() and "](" not in p] == []
