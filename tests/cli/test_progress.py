"""Progress off a terminal is a line now and then."""

from opensora.cli.progress import Stages


def test_steps_of_a_video_make_no_lines_of_their_own_off_a_terminal(capsys):
    with Stages() as stages:
        for done in range(3):
            stages.update("sampling", done, 2)
            for step in range(50):
                stages.update("sampling", done, 2, f"step {step}")
    assert capsys.readouterr().err.splitlines() == ["sampling 0/2", "sampling 2/2"]
