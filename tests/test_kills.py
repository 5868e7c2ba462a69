"""The miniature pipeline, killed at random moments, ends as if nobody had disturbed it."""

from experiments.faults import kill_loop


def test_ten_kills_change_nothing(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    kill_loop.make_world(tmp_path / "whole")
    found = kill_loop.kill_loop(tmp_path / "whole", tmp_path / "killed", 10, 0)
    assert kill_loop.within(found), found
    assert found["steps"] == [24] and found["compared"] > 50
