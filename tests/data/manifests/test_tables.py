"""Tables that people have: quotes, encodings, cut files, arrays. A row comes out as it is written, or says why not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qwen2audio_train.data.manifests.tables import read_table


def rows(path: Path) -> list[tuple[int, Any]]:
    """The rows with their numbers; errors as their words, without the file."""
    return [
        (n, row if isinstance(row, dict) else str(row).removeprefix(f"{path}:")) for n, row in read_table(str(path))
    ]


def test_quotation_marks_of_a_tsv_are_characters(tmp_path: Path) -> None:
    """Common Voice writes its sentences without quoting: a mark at the start of one must not take the next rows in."""
    sentences = ['"Is that so?', "A line in between.", 'She answered: No."', '"Fully quoted."', "plain", 'one " two']
    path = tmp_path / "cv.tsv"
    path.write_text("path\tsentence\n" + "".join(f"{i}.wav\t{s}\n" for i, s in enumerate(sentences)))
    assert [row["sentence"] for _, row in rows(path)] == sentences


def test_quotes_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,text\n1,"one, two"\n2,"say ""yes"""\n3,"over\ntwo, lines"\n4,end\n')
    assert rows(path) == [
        (2, {"id": "1", "text": "one, two"}),
        (3, {"id": "2", "text": 'say "yes"'}),
        (4, {"id": "3", "text": "over\ntwo, lines"}),
        (6, {"id": "4", "text": "end"}),
    ]


@pytest.mark.parametrize("rest", ["2,b\n3,c\n", '2,b\n3,"c"\n', '2,b",\n3,c\n', '2,"b"\n'])
def test_a_quote_left_open_costs_its_own_row(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f'id,text\n1,"open\n{rest}')
    first, *others = rows(path)
    assert first[0] == 2
    assert "2: expected cells of which every quote is closed" in first[1]
    assert (3, {"id": "2", "text": "b"}) in others or "2 cells" in others[0][1]


def test_encodings_are_read_or_named_with_line_and_byte(tmp_path: Path) -> None:
    text = "id,text\n1,Käse\n2,plain\n"
    path = tmp_path / "t.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert [row["text"] for _, row in rows(path)] == ["Käse", "plain"]
    path.write_text(text, encoding="cp1252")
    (number, error), good = rows(path)
    assert (number, good) == (2, (3, {"id": "2", "text": "plain"}))
    assert "2: expected UTF-8 text (write the file anew" in error
    assert "found byte 0xe4 at place 4 of the line" in error
    path.write_text(text, encoding="utf-16-le")
    assert "is it UTF-16 without its mark?" in rows(path)[0][1]
    path.write_text(text, encoding="utf-32")
    ((_, error),) = rows(path)
    assert error.endswith("(write the file anew: iconv -f UTF-32 -t UTF-8 IN > OUT), found the mark of UTF-32LE")


def test_a_cut_and_a_false_gzip_and_a_huge_cell(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    whole = gzip.compress(("id,text\n" + "".join(f"{i},{'x' * 50}{i * 7919}\n" for i in range(3000))).encode())
    path.write_bytes(whole[: len(whole) // 2])
    assert "expected a whole gzip file" in rows(path)[-1][1]
    assert len(rows(path)) > 100
    path.write_bytes(b"id,text\n1,a\n")
    assert rows(path) == [(1, "1: expected a whole gzip file, found Not a gzipped file (b'id')")]
    plain = tmp_path / "t.CSV"
    plain.write_text(f"id,text\n1,{'x' * 200_000}\n2,b\n")
    (number, error), good = rows(plain)
    assert (number, good) == (2, (3, {"id": "2", "text": "b"}))
    assert "field larger than field limit" in error


def test_json_arrays_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"id": "a"}, 7, {"id": "c"}], indent=1))
    assert rows(path) == [
        (1, {"id": "a"}),
        (2, "2: expected one JSON object per line, found 7"),
        (3, {"id": "c"}),
    ]
    path.write_text('[{"id": 1},\n{"id": 2}')
    assert rows(path)[0][0] == 2
    assert "one JSON array of objects" in rows(path)[0][1]
    path.write_text('{"id": 1}\n\n{"id": 2}\n')
    assert rows(path) == [(1, {"id": 1}), (3, {"id": 2})]
    path.write_text('{"id": "a"}\n{"id": "b"}\n', encoding="utf-16")
    assert rows(path) == [(1, {"id": "a"}), (2, {"id": "b"})]
    path.write_text("")
    assert rows(path) == []
