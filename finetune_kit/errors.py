"""The errors a user can meet, and the exit code each one ends the command with.

FinetuneKitError
├── SettingsError     2   recipe or settings
├── DataError         3   rows, files, masks
├── NumericsError     4   NaN, collapse, a result that does not hold
├── ResourceError     5   memory, disk, a package or a network that is not there
├── SecurityError     6   something that would run a stranger's code
└── Stopped          75   ended by SIGTERM, and the same command continues; else 143, or 130 after SIGINT

0 is success. Any other exception is a bug of ours and keeps its traceback.
"""


class FinetuneKitError(Exception):
    """A mistake the user can fix.

    `message` says what was found and what was expected; `fix` is the command or setting that fixes it.
    """

    exit_code = 2

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message if not fix else f"{message}\n{fix}")
        self.message = message
        self.fix = fix


class SettingsError(FinetuneKitError):
    exit_code = 2


class DataError(FinetuneKitError):
    exit_code = 3


class NumericsError(FinetuneKitError):
    exit_code = 4


class ResourceError(FinetuneKitError):
    exit_code = 5


class SecurityError(FinetuneKitError):
    exit_code = 6


class Stopped(FinetuneKitError):
    exit_code = 75
