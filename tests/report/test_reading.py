"""Torn, empty and foreign files are read as far as they go, and told."""

import json
import math

import pytest

from opensora.report.reading import (
    MAX_NOTES,
    Notes,
    finite,
    number,
    read_commands,
    read_document,
    read_lines,
)


@pytest.fixture
def notes(tmp_path):
    return Notes(tmp_path)


def test_torn_lines_are_left_out_and_counted(tmp_path, notes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n[1]\n{"step": 2}\n\xff\xfe\n{"st')
    assert [row["step"] for row in read_lines(path, notes)] == [1, 2]
    ((name, reason),) = notes.entries
    assert name == "metrics.jsonl"
    assert reason.startswith("3 lines, the first 3,")


def test_one_torn_line_is_named(tmp_path, notes):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    assert len(list(read_lines(path, notes))) == 1
    assert notes.entries == [("a.jsonl", "line 2 is torn or not a JSON object, and left out")]


def test_lines_of_absurd_depth_are_left_out(tmp_path, notes):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a":' * 70 + "1" + "}" * 70 + '\n{"a": ' + "[" + "[]," * 90 + "1]}\n")
    assert [len(row["a"]) for row in read_lines(path, notes)] == [91]
    assert len(notes.entries) == 1


def test_a_missing_file_is_nothing_to_note(tmp_path, notes):
    assert list(read_lines(tmp_path / "a.jsonl", notes)) == []
    assert read_document(tmp_path / "a.json", notes) == {}
    assert read_commands(tmp_path, notes) == []
    assert notes.entries == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ('{"a"', "is not JSON"),
        ("[1, 2]", "holds a list"),
        ("3", "holds a number"),
        ("[" * 100_000, "is not JSON"),
        ('{"a":' * 70 + "1" + "}" * 70, "is nested"),
    ],
)
def test_a_document_that_is_no_object_is_told(tmp_path, notes, content, reason):
    (tmp_path / "a.json").write_text(content)
    assert read_document(tmp_path / "a.json", notes) == {}
    assert notes.entries[0][1].startswith(reason)


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path, notes):
    (tmp_path / "a.json").mkdir()
    assert read_document(tmp_path / "a.json", notes) == {}
    assert list(read_lines(tmp_path / "a.json", notes)) == []
    assert len(notes.entries) == 1


def test_numbers_include_the_strings_that_json_has_no_numbers_for():
    assert number("inf") == math.inf
    assert number("-Infinity") == -math.inf
    assert str(number("nan")) == "nan"
    assert number(-math.inf) == -math.inf
    assert number(10**400) == math.inf
    assert number(True) == 1.0
    assert number("1.5") is number(None) is number([1]) is None
    assert finite("nan") is finite(math.inf) is None
    assert finite(2) == 2.0


def test_commands_come_from_json_or_from_a_log_of_either_kind(tmp_path, notes):
    log = 'opensora train a.yaml\n{"command": "b", "seconds": 2}\n\n"quoted"\n'
    (tmp_path / "commands.log").write_text(log)
    found = [row["command"] for row in read_commands(tmp_path, notes)]
    assert found == ["opensora train a.yaml", "b", '"quoted"']
    rows = ["plain", {"command": "c", "exit": 1}, {"seconds": 1}, 7]
    (tmp_path / "commands.json").write_text(json.dumps(rows))
    assert [row["command"] for row in read_commands(tmp_path, notes)] == ["plain", "c"]
    assert notes.entries == [("commands.json", "2 entries have no 'command'")]


def test_notes_do_not_grow_without_bound(tmp_path, notes):
    for index in range(MAX_NOTES + 5):
        notes.add(tmp_path / f"{index}", "broken")
        notes.add(tmp_path / f"{index}", "broken")
    assert len(notes.entries) == MAX_NOTES
    assert notes.num_more >= 5
