"""tiercache: a huge table of fixed-size rows, held in tiers, behind one `fetch`."""

from tiercache.config import HostConfig, StorageConfig, StoreConfig, TableConfig, TraceConfig
from tiercache.errors import ClosedError, ConfigError, FormatError, StorageError, TierCacheError
from tiercache.expectation import Expectation
from tiercache.flight import Ticket
from tiercache.op import as_operator
from tiercache.recording.reader import DamagedRecording, Recording
from tiercache.recording.recorder import Recorder
from tiercache.records import Field, Record
from tiercache.source import Source
from tiercache.stats import CurvePoint, LevelStats, RecordingStats, StorageStats, StoreStats
from tiercache.store import Store

__version__ = "0.1.0"

__all__ = [
    "ClosedError",
    "ConfigError",
    "CurvePoint",
    "DamagedRecording",
    "Expectation",
    "Field",
    "FormatError",
    "HostConfig",
    "LevelStats",
    "Record",
    "Recorder",
    "Recording",
    "RecordingStats",
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
    "TraceConfig",
    "__version__",
    "as_operator",
]
