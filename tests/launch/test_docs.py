"""Every command of the how-to pages fits the schema of its script; nothing is run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2audio_train.cli.compose import given
from tests.launch.scripts import LAUNCH, ROOT, SCHEMAS, composed, script

PAGES = (
    "ablations",
    "costs",
    "data",
    "recipes",
    "evaluation",
    "finetune",
    "finetune_lora",
    "grpo",
    "memory",
    "multinode",
    "preference",
    "serving",
)
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"launch/(\w+)\.py")
LINK = re.compile(r"\]\(([^)#:]+)\)")


def commands(page: str) -> list[list[str]]:
    """The command lines of a page as words, continued lines joined; those with a <placeholder> are left out."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    lines = "".join(BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if SCRIPT.search(line) and "<" not in line]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)}"[:90] for page, words in COMMANDS]
)
def test_a_command_fits_its_script(page: str, words: list[str]) -> None:
    place, name = next((place, found[1]) for place, word in enumerate(words) if (found := SCRIPT.fullmatch(word)))
    arguments = [word for word in words[place + 1 :] if not word.startswith("--") and word != "job"]
    assert (LAUNCH / f"{name}.py").is_file()
    module, commands_of = script(name), getattr(script(name), "COMMANDS", {})
    if name == "plan":
        module.parse(arguments)
    elif arguments[:1] and arguments[0] in commands_of:
        schema, _ = commands_of[arguments[0]]
        given(arguments[1:], schema)
    elif name in SCHEMAS:
        composed(name, *arguments)
    else:
        given(arguments, module.OPTIONS)


def test_pages_have_commands_to_check() -> None:
    assert {page for page, _ in COMMANDS} >= {"data", "recipes", "evaluation", "finetune_lora"}


WRITTEN = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    targets = [Path(target) for target in LINK.findall(path.read_text(encoding="utf-8"))]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_start_page_leads_to_every_page() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_every_symptom_has_a_source() -> None:
    """A public thread, or tests of ours that are there."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [
        line for line in text.splitlines() if line.startswith("| ") and "---" not in line and "| from |" not in line
    ]
    assert len(rows) >= 25
    for row in rows:
        source = row.rstrip(" |").rpartition(" | ")[2]
        tests = re.findall(r"`(tests/[^`]*)`", source)
        assert tests or "](https://github.com/" in source, row
        assert all((ROOT / name).exists() for name in tests), row


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "troubleshooting" / "index.html").is_file()
