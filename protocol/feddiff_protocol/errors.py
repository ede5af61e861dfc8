"""The one tree of errors a user can meet; each class is one exit code (sysexits), each message says
what was expected, what was found and what to do."""

OUR_BUG = 1  # the exit code of every other exception


class FeddiffError(Exception):
    """Something the user, the data or the platform can mend; anything else is our bug."""

    exit_code = OUR_BUG


class UsageInvalid(FeddiffError):
    """The command line does not fit."""

    exit_code = 64


class SpecInvalid(FeddiffError):
    """A job, dataset or stage spec is invalid."""

    exit_code = 65


class DataInvalid(FeddiffError):
    """Records or stored bytes are not what their description says."""

    exit_code = 65


class InputMissing(FeddiffError):
    """A file or object that should be read is not there or cannot be read."""

    exit_code = 66


class StoreUnavailable(FeddiffError):
    """A store does not answer."""

    exit_code = 69


class OutputFailed(FeddiffError):
    """Something cannot be written: read-only store, no permission, a file that exists."""

    exit_code = 73


class StorageFailed(FeddiffError):
    """An input or output error in the middle of work, a full disk among them: room comes back."""

    exit_code = 74


class Interrupted(FeddiffError):
    """Stopped on request, with everything needed to continue later."""

    exit_code = 75


class PrivacyRefusal(FeddiffError):
    """Going on could break the promise: nothing was sent."""

    exit_code = 77


class ConfigurationInvalid(FeddiffError):
    """The installation cannot do what was asked (a package is missing, a setting contradicts another)."""

    exit_code = 78


# Tried again with backoff; evictions and 75 do not count against a job's backoffLimit.
RETRIED_EXIT_CODES = frozenset({69, 74, 75})
# A second try could only end the same way.
FINAL_EXIT_CODES = frozenset({64, 65, 66, 73, 77, 78})
