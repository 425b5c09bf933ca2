"""The exit codes that the documentation promises."""

import pytest

from dsalign import endings


def test_each_ending_has_its_exit_code() -> None:
    kinds = (endings.Ending, endings.Stopped, endings.Diverged, endings.PeerLost)
    assert [kind.code for kind in kinds] == [3, 75, 76, 77]


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("dsalign --algo sft", "dsalign --algo sft --resume"),
        ("dsalign --algo sft --resume", "dsalign --algo sft --resume"),
        ("dsalign --resume out/checkpoint-2 --algo sft", "dsalign --algo sft --resume"),
        ("dsalign --resume=latest --seed 1", "dsalign --seed 1 --resume"),
        ("dsalign --resume_from_checkpoint x --seed 1", "dsalign --seed 1 --resume"),
        ("dsalign --resume-from-checkpoint x", "dsalign --resume"),
        ("NPROC_PER_NODE=2 dsalign --system 'be kind'", "NPROC_PER_NODE=2 dsalign --system 'be kind' --resume"),
        ("dsalign resume out --lr 0.1", "dsalign resume out --lr 0.1"),
        ("deepspeed train.py resume out/checkpoint-4", "deepspeed train.py resume out"),
        ("dsalign --output_dir resume", "dsalign --output_dir resume --resume"),
    ],
)
def test_the_command_that_resumes_a_run(command: str, again: str) -> None:
    assert endings.resuming(command) == again
