"""Every command of the how-to pages fits the schema of its script; nothing is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qwen2audio_train.cli.compose import given
from tests.launch.scripts import LAUNCH, ROOT, SCHEMAS, composed, script

PAGES = (
    "ablations",
    "data",
    "recipes",
    "evaluation",
    "finetune",
    "finetune_lora",
    "grpo",
    "memory",
    "multinode",
    "preference",
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


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / f"docs/{page}.md"
    targets = [Path(target) for target in LINK.findall(path.read_text(encoding="utf-8"))]
    assert [target for target in targets if not (path.parent / target).exists()] == []
