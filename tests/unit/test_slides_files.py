"""Files that are either there and complete, or not there, whoever else writes them."""

from __future__ import annotations

from pathlib import Path

from wholeslide.slides.files import part_name, write_atomically


def test_two_that_write_one_file_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    with write_atomically(path) as slow:
        slow.write_bytes(b"the slow on")
        with write_atomically(path) as quick:
            quick.write_bytes(b"the quick one's")
        assert path.read_bytes() == b"the quick one's"
        with slow.open("ab") as stream:
            stream.write(b"e's")
    assert path.read_bytes() == b"the slow one's"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_found_by_its_ending(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "slide.h5") as beside:
        beside.touch()
        assert list(tmp_path.glob(part_name("*.h5"))) == [beside]
    assert list(tmp_path.glob(part_name("*"))) == []
