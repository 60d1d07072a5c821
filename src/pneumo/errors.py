"""What a user is told when something goes wrong: one sentence, and an exit code."""


class PneumoError(Exception):
    """The run failed; its text is one sentence that says what, where and what to do."""

    exit_code = 1


class Refused(PneumoError):  # noqa: N818 -- reads as the sentence it is: `raise Refused("...")`
    """The arguments or the data were refused before any rank started to work."""

    exit_code = 2
