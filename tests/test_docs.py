"""What the documentation says about the code."""

import re

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


def test_jobs_and_settings_of_the_documents_exist():
    text = README + (ROOT / "docs/cluster.md").read_text()
    jobs = set(re.findall(r"jobs/\w+\.\w+", text))
    assert len(jobs) == 3 and all((ROOT / job).exists() for job in jobs)
    scripts = "".join(path.read_text() for path in (ROOT / "jobs").iterdir())
    lists = re.findall(r"(?:-v '?|--export=ALL,)([^\s']+)", text)
    names = {item.split("=")[0] for given in lists for item in given.split(",")}
    assert names >= {"TAG", "DATA", "LOCAL_DISK"}
    assert [name for name in names | {"MARGIN"} if f': "${{{name}:=' not in scripts] == []
