"""README and docs: links and pictures exist, commands name what exists, and the README stays short."""

import re
import shlex
from pathlib import Path

import pytest

import crl_tasks

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "forks/README.md"]
PAGES += sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
HANDS_ON = {"benchmark/learn.sh": "crl_ppo.py", "benchmark/evaluate.sh": "crl_eval.py"}  # FLAGS
pages = pytest.mark.parametrize("page", PAGES)


def links(page):
    found = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text("utf-8"))
    return [(ROOT / page).parent / link for link in found if "://" not in link]


def commands(page):
    """The commands of the page's bash blocks, and those in its text, without comments."""
    text = (ROOT / page).read_text("utf-8")
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).split("\n")
    lines += re.findall(r"(?<!`)`((?:python|bash|git apply)\s[^`]+)`", text)
    for line in lines:
        for command in line.split("&&"):
            yield " ".join(shlex.split(command, comments=True))


@pages
def test_links_resolve(page):
    assert [link for link in links(page) if not link.exists()] == []


@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/second-design.md"}))  # of an earlier commit
def test_commands_name_what_exists(page):
    for command in commands(page):
        files = re.findall(r"(?:[a-z]+/)?[a-z_]+\.(?:py|sh|patch)", command)
        assert [file for file in files if not (ROOT / file).is_file()] == [], command
        tasks = re.findall(r"--task ([a-z_]+)", command) + re.findall(r" ([a-z_]+):\d", command)
        assert {*tasks} <= {*crl_tasks.TASKS}, command
        for script in [HANDS_ON.get(file, file) for file in files]:
            if script.endswith(".py") and not script.startswith("integrations"):
                source = (ROOT / script).read_text("utf-8")
                for flag in re.findall(r"--([a-z-]+)", command):
                    assert re.search(rf"(^    |[(] ?|, ){flag.replace('-', '_')}: ", source, re.M), command
                for name in re.findall(r"\.py ([a-z]+)(?= |$)", command):
                    assert f'"{name}"' in source, command


def test_the_readme_is_short_and_pictures_are_shown():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 160 and len(text.encode()) <= 11 * 1024
    prose = re.sub(r"```.*?```|^\|.*?$|^!\[.*?$", "", text, flags=re.S | re.M)
    assert [part for part in re.split(r"\n\n|^\* ", prose, flags=re.M) if len(part) > 500] == []
    shown = [link.name for page in PAGES for link in links(page)]
    assert [p.name for p in (ROOT / "docs").glob("*.*g") if p.name not in shown] == []
