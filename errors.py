"""The two roots of every error that featlas raises on purpose.

A `UserError` is a mistake in what was asked (a wrong name, file or option): the command line exits with 2.
Any other `FeatlasError` is a failure of something that should have worked (a store that is down): exit 1.
Each situation has its own subclass, in the module that raises it; its message names the value and the way out.
"""


class FeatlasError(Exception):
    """Something that should have worked did not."""

    exit_code = 1


class UserError(FeatlasError):
    """What was asked for cannot be done as asked."""

    exit_code = 2
