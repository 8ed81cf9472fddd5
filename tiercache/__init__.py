"""tiercache: a huge table of fixed-size rows, held in tiers, behind one `fetch`."""

from tiercache.config import HostConfig, StorageConfig, StoreConfig, TableConfig
from tiercache.errors import ClosedError, ConfigError, FormatError, StorageError, TierCacheError
from tiercache.flight import Ticket
from tiercache.op import as_operator
from tiercache.records import Field, Record
from tiercache.source import Source
from tiercache.stats import CurvePoint, LevelStats, StorageStats, StoreStats
from tiercache.store import Store

__version__ = "0.1.0"

__all__ = [
    "ClosedError",
    "ConfigError",
    "CurvePoint",
    "Field",
    "FormatError",
    "HostConfig",
    "LevelStats",
    "Record",
    "Source",
    "StorageConfig",
    "StorageError",
    "StorageStats",
    "Store",
    "StoreConfig",
    "StoreStats",
    "TableConfig",
    "Ticket",
    "TierCacheError",
    "__version__",
    "as_operator",
]
