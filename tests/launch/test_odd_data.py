"""Odd files, tables and names through the commands of launch/data.py: read alike by all, or told in a sentence."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.corpora import asr_line, write_corpus
from tests.data.storage.test_blobs import write_tar
from tests.launch.scripts import script

Run = Callable[..., tuple[int, str]]
CONVERT = ("convert", "output=o/m.jsonl", "num_workers=1", "constants.task=asr")
TABLE = (*CONVERT, "columns.id=id", "columns.audio=file", "columns.target=text")
NO_DECODE = ("decode=false", "num_workers=1")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("check", ...) -> exit status, and what was printed, in a folder with a/0.wav (1 s)."""
    write_corpus(tmp_path, "a", [1.0])
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            status: int = script("data").main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def written() -> list[dict[str, object]]:
    return [json.loads(line) for line in Path("o/m.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_folder_of_any_name_is_read_by_every_command(run: Run) -> None:
    line = json.dumps(asr_line("u", "../a/0.wav", 1.0, "hello")) + "\n"
    for name in ("[en] set", "a,b=c {old} 50 %", "sp ace", "ü 語"):
        Path(name).mkdir()
        Path(name, "m.jsonl").write_text(line)
        given = f'["{name}/m.jsonl"]'
        assert run("check", f"manifests={given}", *NO_DECODE)[0] == 0
        status, told = run("stats", f"manifests={given}")
        assert (status, " 1 " in told) == (0, True)
        assert run("show", f'manifest="{name}/m.jsonl"', "example=u")[0] == 0
        assert run("shard", f"manifests={given}", f'output="{name}/out"', "num_workers=1")[0] == 0
        assert run(*CONVERT, f'input="{name}/m.jsonl"')[0] == 0


def test_every_command_reads_what_a_recipe_reads(run: Run) -> None:
    """Globs, gzip, folders, URLs, tars, with the same number of examples; a place that is empty is told."""
    lines = [json.dumps(asr_line(f"u{n}", "../a/0.wav", 1.0, "hello")) + "\n" for n in range(3)]
    for folder in "gp":
        Path(folder).mkdir()
    Path("g/1.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    Path("p/2.jsonl").write_text("".join(lines))
    for given in ("g/*.gz", "p", "g/1.jsonl.gz", f"file://{os.getcwd()}/p/2.jsonl"):
        status, told = run("check", f'manifests=["{given}"]', *NO_DECODE)
        assert (status, "3 examples" in told) == (0, True), told
        assert re.search(r"\s3 .*asr 3", run("stats", f'manifests=["{given}"]')[1])
        assert run("show", f'manifest="{given}"', "example=u2")[0] == 0
        assert run("shard", f'manifests=["{given}"]', f"output=o{len(given)}", "num_workers=1")[0] == 0
    Path("empty").mkdir()
    for command in ("check", "stats", "shard"):
        more = ["output=o"] if command == "shard" else []
        status, told = run(command, "manifests=[empty]", *more)
        assert (status, "empty is of no form that can be told by its looks" in told) == (2, True)
        status, told = run(command, "manifests=[none/*.jsonl]", *more)
        assert (status, "no file 'none/*.jsonl'" in told) == (2, True)


def test_what_is_converted_passes_its_own_check(run: Run) -> None:
    """Clips about the shortest, slices about the end of their file."""
    for name, seconds in {"t10": 0.01, "t30": 0.03, "t40": 0.04}.items():
        write_corpus(Path(), name, [seconds])
    rows = ["t10/0.wav,,", "t30/0.wav,,", "t40/0.wav,,", "a/0.wav,0.99,", "a/0.wav,5,", "a/0.wav,-1,", "a/0.wav,0.96,"]
    rows += ["a/0.wav,0.5,0.52", "a/0.wav,0.5,0.54", "a/0.wav,0.5,1.04", "a/0.wav,0.5,1.2", "a/0.wav,0.7,0.6"]
    table = "id,file,text,start,end\n" + "".join(
        f"{n},{file},x,{bounds}\n" for n, (file, _, bounds) in enumerate(row.partition(",") for row in rows)
    )
    Path("t.csv").write_text(table)
    times = ("columns.start_s=start", "columns.end_s=end")
    status, told = run(*TABLE, *times, "input=t.csv", "skip_bad=true")
    assert (status, "4 examples, 8 rows left out" in told) == (0, True), told
    lasts = {line["id"]: line["duration_s"] for line in written()}
    assert lasts == pytest.approx({"2": 0.04, "6": 0.04, "8": 0.04, "9": 0.54})
    assert run("check", "manifests=[o/m.jsonl]", "num_workers=1")[0] == 0


def test_columns_that_look_like_something_else_choose_rows(run: Run) -> None:
    Path("t.csv").write_text("id,file,text,valid,accent,split\n1,a/0.wav,x,true,no,01\n2,a/0.wav,y,false,yes,1\n")
    for chosen in ("valid=true", "accent=no", "split=01"):
        assert run(*TABLE, "input=t.csv", f"where.{chosen}")[0] == 0
        assert [line["id"] for line in written()] == ["1"]
    status, told = run(*TABLE, "input=t.csv", "where.split=1e0")
    assert (status, "no row has where.split=1e0; the column has '01' (1), '1' (1)" in told) == (2, True)
    for label in ("no", "007", "1e3", "true"):
        run(*TABLE[:-1], "input=t.csv", f"constants.target={label}")
        assert [line["target"] for line in written()] == [label] * 2


def test_names_that_are_not_utf8_cost_their_row(run: Run) -> None:
    """A Kaldi folder with a Latin-1 id, a Latin-1 path and one in a pipe; a Latin-1 member of a tar."""
    Path("k").mkdir()
    Path("k/wav.scp").write_bytes(b"u1 ../a/0.wav\nu\xf6 ../a/0.wav\nu3 ../a/\xf6.wav\nu4 sox \xf6.sph -t wav - |\n")
    Path("k/text").write_bytes(b"u1 one\nu\xf6 two\nu3 three\nu4 f\xf6ur\n")
    status, told = run(*CONVERT, "input=k", "skip_bad=true")
    assert (status, "1 examples, 3 rows left out" in told) == (0, True), told
    assert [line["target"] for line in written()] == ["one"]
    status, told = run("check", "sources.k.path=[k]", "sources.k.constants.task=asr", "num_workers=1")
    assert (status, told.count("k/text:")) == (1, 3), told
    write_tar(Path("l.tar"), {"b.wav": Path("a/0.wav").read_bytes(), "b.txt": b"K\xe4se"})
    status, told = run(*CONVERT, "input=l.tar", "skip_bad=true")
    assert (status, "nothing was written" in told, "UTF-8 text" in told) == (2, True, True)


def test_tables_that_cannot_be_read_are_told_by_their_lines(run: Run) -> None:
    whole = gzip.compress(b"id,file,text\n" + b"".join(b"%d,a/0.wav,%d\n" % (n, n * 7919) for n in range(3000)))
    tables = {
        "cp1252.csv": ("id,file,text\n1,a/0.wav,It\u2019s\n".encode("cp1252"), "cp1252.csv:2: expected UTF-8 text"),
        "huge.csv": (b"id,file,text\n1,a/0.wav," + b"x" * 200_000 + b"\n", "field larger than field limit"),
        "open.csv": (b'id,file,text\n1,a/0.wav,"open\n', "open.csv:2: expected cells of which every quote is closed"),
        "cut.csv.gz": (whole[: len(whole) // 2], "expected a whole gzip file"),
        "twice.csv": (b"id,file,text,text\n1,a/0.wav,x,y\n", 'field "text": expected column names of their own'),
    }
    for name, (content, says) in tables.items():
        Path(name).write_bytes(content)
        status, told = run(*TABLE, f"input={name}")
        assert (status, says in told) == (1, True), told
    for name in ("x.xlsx", "x.txt"):
        Path(name).write_bytes(b"PK\x03\x04" + bytes(range(256)))
        status, told = run(*TABLE, f"input={name}")
        assert (status, "is no table that is read" in told) == (2, True), told


def test_nothing_usable_is_an_error_with_its_reason_and_empty_cells_are_told(run: Run) -> None:
    Path("n.jsonl").write_text('{"task": "asr"}\n')
    status, told = run("shard", "manifests=[n.jsonl]", "output=s", "num_workers=1")
    assert (status, 'none of 1 rows is an example: 1 x field "audio"' in told) == (2, True), told
    words = ["nan", "None", "NULL", "n/a", "undefined", "none of it"]
    Path("t.csv").write_text("id,file,text\n" + "".join(f"{n},a/0.wav,{word}\n" for n, word in enumerate(words)))
    assert run(*TABLE, "input=t.csv")[0] == 0
    status, told = run("check", "manifests=[o/m.jsonl]", *NO_DECODE)
    assert (status, "warning: empty cell, 5 x" in told) == (0, True)
