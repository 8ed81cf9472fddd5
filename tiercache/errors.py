"""Every error that tiercache raises on purpose.

    TierCacheError
    ├── ConfigError   (ValueError)    a setting is unknown, unparsable or impossible; names field, value and what is allowed
    ├── FormatError   (ValueError)    a file is not what it claims to be: foreign, truncated, unsupported dtype, wrong identity
    ├── StorageError  (OSError)       a read failed, came back short, or the file changed under the store; has errno and path
    └── ClosedError   (RuntimeError)  the store was closed, or belongs to the process this one was forked from

Arguments of a single call raise the builtins a caller expects: IndexError for a row out of range, TypeError for a wrong
dtype or device, ValueError for a wrong shape.
"""


class TierCacheError(Exception):
    """Base of all errors of this package."""


class ConfigError(TierCacheError, ValueError):
    """A setting is unknown, unparsable or impossible."""


class FormatError(TierCacheError, ValueError):
    """A file's content is not a table that can be served."""


class StorageError(TierCacheError, OSError):
    """Bytes could not be read or written. `errno`, `strerror` and `filename` are those of the failure."""


class ClosedError(TierCacheError, RuntimeError):
    """The store no longer serves."""
