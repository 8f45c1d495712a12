"""Probing: what a folder of videos becomes, and what is said about files that cannot be used."""

import pytest
from data_support import write_clip
from hypothesis import given
from hypothesis import strategies as st

from opensora.data import manifest
from opensora.data.folder import ProbeOptions, fill, probe_folder, words_of, write_refused
from opensora.data.tables import read_table
from opensora.errors import DataError

HEADER = "path,text,num_frames,height,width,fps"


@pytest.fixture
def folder(tmp_path):
    """Three readable videos of different shapes, and three files that are none."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write_clip(tmp_path / "red_Car-01.mp4", num_frames=24)
    write_clip(tmp_path / "sub" / "影片 (2).mp4", num_frames=9, size=(48, 80), fps=24)
    write_clip(tmp_path / "sub" / "0001.gif", num_frames=5, size=(32, 32), fps=10)
    write_clip(tmp_path / ".hidden" / "x.mp4", num_frames=2)
    whole = (tmp_path / "red_Car-01.mp4").read_bytes()
    (tmp_path / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mkv").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"not a video at all")
    (tmp_path / "notes.md").write_text("no video")
    return tmp_path


def test_a_folder_becomes_a_manifest_that_reads_back(folder):
    found, refused = probe_folder(folder)
    assert list(found.paths) == ["red_Car-01.mp4", "sub/0001.gif", "sub/影片 (2).mp4"]
    assert list(found.texts) == ["red car", "sub", "影片"]
    assert found.num_frames.tolist() == [24, 5, 9]
    assert found.height.tolist() == [64, 32, 48]
    assert found.width.tolist() == [64, 32, 80]
    assert found.fps.tolist() == pytest.approx([8, 10, 24])
    assert [item.path for item in refused] == ["empty.mkv", "text.mp4", "torn.mp4"]
    assert "empty (0 bytes)" in refused[0].reason
    assert all(item.reason for item in refused)
    manifest.write(found, folder / "manifest.csv")
    again = manifest.read(folder / "manifest.csv")
    assert again.identity == found.identity
    assert manifest.check_files(again) == 3


def test_captions_come_from_the_table_then_the_sidecar_then_the_name(folder):
    (folder / "red_Car-01.txt").write_text("a red car\n drives ", encoding="utf-8-sig")
    (folder / "sub" / "影片 (2).txt").write_text(" \n")
    (folder / "captions.csv").write_text("file,caption\n0001.gif,an icon\nabsent.mp4,nothing\n")
    found, _ = probe_folder(folder, captions=folder / "captions.csv")
    assert list(found.texts) == ["a red car drives", "an icon", "影片"]
    (folder / "captions.csv").write_text("path,text\nsub/0001.gif,by path\nred_Car-01.mp4,table\n")
    found, _ = probe_folder(folder, captions=folder / "captions.csv")
    assert list(found.texts) == ["table", "by path", "影片"]


def test_captions_that_cannot_be_read_are_refused(folder):
    (folder / "captions.csv").write_text("name,words\na,b\n")
    with pytest.raises(DataError, match=r"needs a column named path or file .*; found name, words"):
        probe_folder(folder, captions=folder / "captions.csv")
    (folder / "red_Car-01.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"caption .*red_Car-01\.txt cannot be read"):
        probe_folder(folder)


def test_folders_without_a_usable_video_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        probe_folder(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no video; looked for \.mp4"):
        probe_folder(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"junk")
    with pytest.raises(DataError, match="none of the 1 videos"):
        probe_folder(tmp_path)


def test_progress_counts_every_file_and_decoding_agrees_with_packets(folder):
    told = []
    options = ProbeOptions(count="packets", progress=lambda done, all: told.append((done, all)))
    found, _ = probe_folder(folder, options=options)
    assert told == [(n, 6) for n in range(1, 7)]
    assert found.identity == probe_folder(folder)[0].identity


def test_missing_columns_and_cells_are_filled_from_the_files(folder):
    path = folder / "m.csv"
    path.write_text(
        "path,text,num_frames,aes\n"
        "red_Car-01.mp4,first,,4.5\n"
        "torn.mp4,second,,5\n"
        "sub/0001.gif,third,3,6\n"
        "red_Car-01.mp4,again,12,7\n"
    )
    found, refused = fill(path)
    assert list(found.texts) == ["first", "third", "again"]
    assert found.num_frames.tolist() == [24, 3, 12]  # what is stated is kept
    assert found.width.tolist() == [64, 32, 64]
    assert found.scores["score_aes"].tolist() == [4.5, 6, 7]
    assert [item.path for item in refused] == ["torn.mp4"]


def test_a_complete_manifest_is_filled_without_opening_a_file(tmp_path):
    (tmp_path / "m.csv").write_text(f"{HEADER}\nabsent.mp4,x,24,64,64,8\n")
    found, refused = fill(tmp_path / "m.csv")
    assert len(found) == 1
    assert refused == []


def test_fill_refuses_what_it_cannot_fill(tmp_path):
    (tmp_path / "m.csv").write_text("path,caption\na.mp4,x\n")
    with pytest.raises(DataError, match="lacks the column 'text'"):
        fill(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("path,text\na.mp4,x\n")
    with pytest.raises(DataError, match=r"no row of .* can be used: .*a\.mp4"):
        fill(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("path,text,fps\na.mp4,x,fast\n")
    with pytest.raises(DataError, match="not a number"):
        fill(tmp_path / "m.csv")


def test_refused_files_are_written_down(folder):
    _, refused = probe_folder(folder)
    write_refused(refused, folder / "quarantine.csv")
    table = read_table(folder / "quarantine.csv")
    assert list(table["path"]) == [item.path for item in refused]
    assert list(table["reason"]) == [item.reason for item in refused]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Clips/red-CarDriving_720p_003.mp4", "red car driving"),
        ("-leading-dash-name.mp4", "leading dash name"),
        ("ApplyLipstick/v_001_02.avi", "v"),
        ("surfing/0001.mp4", "surfing"),
        ("0001.mp4", "a video"),
        ("日本 の 海.mp4", "日本 の 海"),
        ("it's 5 o'clock.webm", "it s o clock"),
    ],
)
def test_file_names_become_words(name, words):
    assert words_of(name) == words


@given(st.text(min_size=1).filter(lambda text: "/" not in text and "\0" not in text))
def test_every_file_name_gives_some_words(name):
    assert words_of(name).strip()


def test_real_and_hostile_footage_is_used_or_refused_with_a_reason(footage):
    found, refused = probe_folder(footage, options=ProbeOptions(count="packets"))
    named = {path.name for path in footage.iterdir()} - {"MANIFEST.csv"}
    known = {*found.paths, *(item.path for item in refused)}
    assert known == {name for name in named if not name.endswith((".mp3", ".wav"))}
    expected = {
        "derived_empty.mp4",
        "derived_not_a_video.mp4",
        "derived_truncated_half.mp4",
        "derived_zeroed_2kB.mkv",
    }
    assert expected <= {item.path for item in refused}
    assert all(len(item.reason) > 10 for item in refused)
    assert len(found) > 40
    assert found.texts[list(found.paths).index("asl_bird.mkv")] == "asl bird"
