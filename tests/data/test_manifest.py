"""Manifests: what is accepted, what is refused and how the refusal reads."""

import csv
import logging
import tracemalloc

import numpy as np
import pytest
from data_support import make_manifest
from hypothesis import given
from hypothesis import strategies as st

from opensora.data import manifest, packed, tables
from opensora.data.packed import PackedStrings
from opensora.errors import DataError

HEADER = "path,text,num_frames,height,width,fps"


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def refusal(path) -> str:
    with pytest.raises(DataError) as caught:
        manifest.read(path)
    assert caught.value.exit_code == 65
    return str(caught.value)


@given(st.lists(st.text()))
def test_packed_strings_are_the_strings(strings):
    try:
        found = PackedStrings.pack(strings)
    except UnicodeEncodeError:  # a lone surrogate is no text
        assert any("\ud800" <= letter <= "\udfff" for text in strings for letter in text)
        return
    assert list(found) == strings
    assert len(found) == len(strings)
    assert list(PackedStrings.join([found, found])) == strings * 2
    if strings:
        assert found[-1] == strings[-1]
        assert list(found.take(np.array([0, 0]))) == [strings[0]] * 2
    with pytest.raises(IndexError):
        found[len(strings)]


def test_packed_strings_cost_little_more_than_their_letters():
    tracemalloc.start()
    found = PackedStrings.pack("x" * 40 for _ in range(50_000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 50_000
    assert held < 50_000 * (40 + 8) * 1.1


def test_a_csv_of_open_sora_is_read_with_its_own_column_names(tmp_path):
    path = write(
        tmp_path / "meta.csv",
        "path,text,num_frames,height,width,aspect_ratio,resolution,fps,text_len,aes,flow,match,"
        "cmotion,timestamp,id,score_vmafmotion\n"
        'sub/a.mp4,"two, ""three""\nlines",24,48,64,0.75,3072,29.97,5,4.5,0.1,20,pan_left,,a1,7\n'
        "/data/b.mp4,影片,1,480,640,0.75,307200,,2,,,,,,b2,\n",
        "utf-8-sig",
    )
    found = manifest.read(path)
    assert len(found) == 2
    assert found.texts[0] == 'two, "three"\nlines'
    assert found.texts[1] == "影片"
    assert found.location(0) == tmp_path / "sub" / "a.mp4"
    assert str(found.location(1)) == "/data/b.mp4"
    assert set(found.scores) == {"score_aes", "score_flow", "score_match", "score_vmafmotion"}
    assert found.scores["score_aes"][0] == 4.5
    assert np.isnan(found.scores["score_aes"][1])
    assert list(found.ids) == ["a1", "b2"]
    assert found.fps.tolist() == [29.97, 1.0]  # a still picture needs no rate
    assert found.seconds[0] == pytest.approx(24 / 29.97)


def test_a_window_limits_the_seconds_of_a_row(tmp_path):
    rows = "a,x,240,9,9,24,,\nb,x,240,9,9,24,2,5\nc,x,240,9,9,24,2,99\nd,x,240,9,9,24,,3.5\n"
    found = manifest.read(write(tmp_path / "m.csv", f"{HEADER},start,end\n{rows}"))
    assert found.seconds.tolist() == [10, 3, 8, 3.5]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_written_manifest_reads_back_equal(tmp_path, suffix):
    first = make_manifest(
        tmp_path, 7, start=0.5, end=[2.5, 9, 9, 9, 9, 9, np.inf], fps=30000 / 1001
    )
    first.scores["score_aes"] = np.array([1, 2, 3, np.nan, 5, 6, 7], np.float32)
    manifest.write(first, tmp_path / f"m{suffix}")
    second = manifest.read(tmp_path / f"m{suffix}")
    assert second.identity == first.identity
    assert list(second.paths) == list(first.paths)
    assert second.end[-1] == np.inf


def test_csv_and_parquet_of_the_same_rows_have_the_same_identity(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_CHUNK_ROWS", 100)
    monkeypatch.setattr(packed, "_BLOCK", 70)
    first = make_manifest(tmp_path, 1030)
    for suffix in (".csv", ".parquet"):
        manifest.write(first, tmp_path / f"m{suffix}")
        assert manifest.read(tmp_path / f"m{suffix}").identity == first.identity


def test_the_identity_changes_with_any_cell_and_not_with_the_folder(tmp_path):
    base = make_manifest(tmp_path, 3)
    assert make_manifest(tmp_path / "elsewhere", 3).identity == base.identity
    assert make_manifest(tmp_path, 4).identity != base.identity
    for change in ({"fps": [8, 8, 9.0]}, {"width": [64, 65, 64]}, {"start": [0, 0, 0.1]}):
        assert make_manifest(tmp_path, 3, **change).identity != base.identity
    moved = make_manifest(tmp_path, 3)
    texts = PackedStrings.pack(["clip 0", "clip 1clip", " 2"])
    object.__setattr__(moved, "texts", texts)
    assert texts.data.tobytes() == base.texts.data.tobytes()
    assert moved.identity != base.identity


def test_missing_columns_are_told_with_what_was_meant(tmp_path):
    message = refusal(write(tmp_path / "m.csv", "path,text,num_frames,hieght,width\na,b,1,2,3\n"))
    assert "lacks the columns 'height' (is 'hieght' meant for it?), 'fps'." in message
    assert "`opensora data probe` fills these" in message
    assert "Expected: path, text, num_frames, height, width, fps." in message
    assert "Found: path, text, num_frames, width, hieght." in message
    message = refusal(write(tmp_path / "m.csv", "pth,text\na,b\n"))
    assert "'path' (is 'pth' meant for it?)" in message
    assert "fills these" not in message


def test_a_misspelt_optional_column_is_refused_rather_than_ignored(tmp_path):
    path = write(tmp_path / "m.csv", f"{HEADER},strat\na,b,1,2,3,4,5\n")
    assert "unknown column 'strat'. Did you mean 'start'?" in refusal(path)
    both = write(tmp_path / "m.csv", f"{HEADER},aes,score_aes\na,b,1,2,3,4,5,5\n")
    assert "both 'aes' and 'score_aes'" in refusal(both)


def test_columns_without_a_use_are_named_in_the_log(tmp_path, caplog):
    path = write(tmp_path / "m.csv", f"{HEADER},licence,cmotion\na,b,1,2,3,4,CC0,static\n")
    with caplog.at_level(logging.INFO, logger="opensora"):
        manifest.read(path)
    assert "columns not used here: cmotion, licence" in caplog.text


def test_the_first_ten_impossible_rows_are_told_with_number_and_reason(tmp_path):
    rows = [
        "a.mp4,x,24,48,64,8",
        ",x,24,48,64,8",
        "a.mp4,x,0,48,64,8",
        "a.mp4,x,24.5,48,64,8",
        "a.mp4,x,24,,64,8",
        "a.mp4,x,24,48,wide,8",
        "a.mp4,x,24,48,64,0",
        "a.mp4,x,24,48,64,inf",
        "a.mp4,x,24,48,64,nan",
        *["a.mp4,x,24,48,-1,8"] * 5,
    ]
    message = refusal(write(tmp_path / "m.csv", HEADER + "\n" + "\n".join(rows) + "\n"))
    assert "13 rows cannot be used (rows are counted from 0" in message
    for part in (
        "row 1: path is empty",
        "row 2: num_frames must be a whole number, 1 or more, found 0.0",
        "row 3: num_frames must be a whole number, 1 or more, found 24.5",
        "row 4: height must be a whole number, 1 or more, found nothing",
        "row 5: width must be a number, found wide",
        "row 6: fps must be above 0 and up to 1000, found 0.0",
        "row 7: fps must",
        "row 8: fps must",
        "row 10: width",
    ):
        assert part in message
    assert "row 0:" not in message
    assert "row 11:" not in message


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        ("-1", "", "start must be 0 or more"),
        ("2", "1", "end must come after start"),
        ("5", "6", "start must come before the end of the file"),
        ("", "0", "end must come after start"),
        ("x", "", "start must be a number, found x"),
    ],
)
def test_impossible_windows_are_refused(tmp_path, start, end, reason):
    row = f"a.mp4,x,24,48,64,8,{start},{end}\n"
    assert reason in refusal(write(tmp_path / "m.csv", f"{HEADER},start,end\n{row}"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty: its first line must name the columns"),
        (HEADER.encode() + b"\n", "has no rows"),
        (HEADER.replace(",", ";").encode() + b"\n", "not separated by commas"),
        (HEADER.encode() + b"\na,b,c,1,2,3,4\n", "line 2: 7 cells where the header has 6"),
        (HEADER.encode() + b"\na,caf\xe9,1,2,3,4\n", "not UTF-8"),
        (HEADER.encode() + b",path\n", "column 'path' twice"),
        (HEADER.encode() + b'\na,"' + b"x" * 140_000 + b'",1,2,3,4\n', "field larger than"),
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path, content, reason):
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_absent_files_other_kinds_and_broken_parquet_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "absent.csv")
    assert "neither .csv nor .parquet" in refusal(write(tmp_path / "m.json", "{}"))
    assert "not a readable Parquet file" in refusal(write(tmp_path / "m.parquet", "PAR1"))
    with pytest.raises(DataError, match="neither"):
        manifest.write(make_manifest(tmp_path, 1), tmp_path / "m.txt")


def test_rows_without_text_are_counted_in_the_log(tmp_path, caplog):
    manifest.read(write(tmp_path / "m.csv", f"{HEADER}\na,,1,2,3,4\nb,x,1,2,3,4\n"))
    assert "1 rows have no text, among them 0" in caplog.text


def test_missing_files_are_told_before_work_starts(tmp_path):
    rows = make_manifest(tmp_path, 30)
    for row in range(30):
        if row not in (3, 7):
            rows.location(row).touch()
    told = r"2 of 30 files looked at do not exist: row 3: .*0003\.mp4; row 7"
    with pytest.raises(DataError, match=told):
        manifest.check_files(rows)
    assert manifest.check_files(rows, at_most=2) == 2
    with open(tmp_path / "m.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER.split(","), ["0000.mp4", "x", 1, 2, 3, 4]])
    assert manifest.check_files(manifest.read(tmp_path / "m.csv")) == 1
