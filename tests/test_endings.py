"""The exit codes that the documentation promises."""

from dsalign import endings


def test_each_ending_has_its_exit_code() -> None:
    kinds = (endings.Ending, endings.Stopped, endings.Diverged, endings.PeerLost)
    assert [kind.code for kind in kinds] == [3, 75, 76, 77]
