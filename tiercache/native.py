"""What compiled code needs of the machine: memory by address, acquire/release accesses, system calls, pthread locks.

Every primitive is a Python function with a compiled twin (`@overload`), so that the whole package runs the same with
NUMBA_DISABLE_JIT=1. Symbols are resolved by LLVM from the running process; no pointer is baked into compiled code, which
therefore can be cached on disk. Addresses are int64.
"""

import ctypes
import hashlib
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import config, njit, typeof, types
from numba.core import cgutils
from numba.core.caching import IndexDataCacheFile
from numba.extending import intrinsic, overload

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _fingerprint() -> str:
    """Digest of every module that holds compiled code."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        if any(mark in source for mark in (b"@jit", b"@lean", b"@overload")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + source)
    return digest.hexdigest()


_STAMP = _fingerprint()


def jit(function: _Function) -> _Function:
    """`numba.njit(nogil=True, cache=True)` whose cache entry is valid only for exactly these sources of the package.

    Numba itself looks at the file of the function alone, and would go on using a cached caller of a changed callee. Where no
    directory can be written, nothing is cached, which a RuntimeWarning tells once.
    """
    return _compiled(function)


def lean(function: _Function) -> _Function:
    """`jit` for a function that makes no array, and whose callees make none: compiled without reference counts.

    Otherwise each call counts each array of its arguments up and down, atomically: several times the work of a policy. It
    pays only if the callers in the inner loop are lean too.
    """
    return _compiled(function, _nrt=False)


def inlined(function: _Function) -> _Function:
    """`lean` for what is called often with a policy's whole state, whose hundred words a call would have to copy.

    Its rare and long parts belong in functions of their own that are not.
    """
    return _compiled(function, _nrt=False, forceinline=True)


def entry_of(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """The entry of a compiled function for arguments of these types. A call of it looks at no types.

    That saves 3 of 4 us where a policy's state is among the arguments. Whoever calls it vouches for the types: arrays of
    another number of axes or item size raise TypeError, all else that is of another type is undefined behaviour.
    """
    if config.DISABLE_JIT:
        return function
    return cast("Any", function).compile(tuple(map(_type_of, arguments)))


def _type_of(argument: Any) -> Any:
    """The type of an argument in compiled code; any integer is an int64, whatever the next one will be."""
    is_integer = isinstance(argument, int | np.integer) and not isinstance(argument, bool)
    return types.int64 if is_integer else typeof(argument)


class Settled:
    """A compiled function whose arguments are of the same types in every call: those of the first. See `entry_of`."""

    __slots__ = ("_entry", "_function")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._entry: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._entry is None:
            self._entry = entry_of(self._function, arguments)
        return self._entry(*arguments)


def _compiled(function: _Function, **options: Any) -> _Function:
    if not _caching:
        return cast("_Function", njit(nogil=True, **options)(function))
    try:
        return _stamped(njit(nogil=True, cache=True, **options)(function))
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    _caching.clear()
    warnings.warn(
        "tiercache: compiled code cannot be kept, as neither the package's directory nor a cache directory can be written; "
        "each process compiles for about 20 s. NUMBA_CACHE_DIR names a directory to keep it in",
        RuntimeWarning,
        stacklevel=2,
    )
    return _compiled(function, **options)


_caching = [True]
"""Empty once it has shown that nothing can be cached."""


class _CacheIndex(IndexDataCacheFile):  # type: ignore[misc]
    """Numba's index of a cache directory; empty where it names a type that is gone, or is another program's own."""

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except (ImportError, AttributeError):
            return {}


def _stamped(dispatcher: Any) -> Any:
    if not config.DISABLE_JIT:
        index = dispatcher._cache._cache_file
        index.__class__ = _CacheIndex
        index._source_stamp = _STAMP
    return dispatcher


int64 = cast("Callable[[Any], int]", np.int64)
"""`np.int64` as a conversion in compiled code, where it is the same thing as int."""

_i64 = types.int64
_c_memcpy = types.ExternalFunction("memcpy", _i64(_i64, _i64, _i64))
_c_syscall = types.ExternalFunction("syscall", _i64(_i64, _i64, _i64, _i64, _i64, _i64, _i64))
_c_pread = types.ExternalFunction("pread64", _i64(types.int32, _i64, _i64, _i64))
_c_errno = types.ExternalFunction("__errno_location", _i64())
_c_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, _i64))
_c_lock = types.ExternalFunction("pthread_mutex_lock", types.int32(_i64))
_c_unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(_i64))
_c_broadcast = types.ExternalFunction("pthread_cond_broadcast", types.int32(_i64))
_c_timedwait = types.ExternalFunction("pthread_cond_timedwait", types.int32(_i64, _i64, _i64))
_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("syscall", "pread64"):
    getattr(_libc, _name).restype = ctypes.c_long

MUTEX_BYTES = 64
"""A zeroed block of this many bytes is an unlocked pthread mutex, or a condition variable without waiters (Linux)."""

SYS_READ = {"x86_64": 0, "aarch64": 63}.get(platform.machine(), -1)
SYS_WRITE = {"x86_64": 1, "aarch64": 64}.get(platform.machine(), -1)
SYS_PPOLL = {"x86_64": 271, "aarch64": 73}.get(platform.machine(), -1)
SYS_IO_URING_SETUP, SYS_IO_URING_ENTER, SYS_IO_URING_REGISTER = 425, 426, 427
SYS_STATX = {"x86_64": 332, "aarch64": 291}.get(platform.machine(), -1)


def memcpy(destination: int, source: int, num_bytes: int) -> None:
    """Copy bytes between two addresses that do not overlap."""
    ctypes.memmove(int(destination), int(source), int(num_bytes))


@overload(memcpy)
def _memcpy(destination, source, num_bytes):  # type: ignore[no-untyped-def]
    def copy(destination, source, num_bytes):  # type: ignore[no-untyped-def]
        _c_memcpy(destination, source, num_bytes)

    return copy


def _mover(num_bytes: int) -> Any:
    """Copy a fixed number of bytes between addresses of any alignment, through one vector register."""
    word = ir.IntType(8 * num_bytes) if num_bytes <= 8 else ir.VectorType(ir.IntType(64), num_bytes // 8)

    @intrinsic
    def move(context, destination, source):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            target, origin = (builder.inttoptr(argument, word.as_pointer()) for argument in arguments)
            builder.store(builder.load(origin, align=1), target, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return move


_move64, _move8, _move1 = _mover(64), _mover(8), _mover(1)


def copy(destination: int, source: int, num_bytes: int) -> None:
    """`memcpy` for records of some hundred bytes, without the call."""
    ctypes.memmove(int(destination), int(source), int(num_bytes))


@overload(copy, jit_options={"forceinline": True})
def _copy(destination, source, num_bytes):  # type: ignore[no-untyped-def]
    def words(destination, source, num_bytes):  # type: ignore[no-untyped-def]
        at = np.int64(0)
        while at + 64 <= num_bytes:
            _move64(destination + at, source + at)
            at += 64
        while at + 8 <= num_bytes:
            _move8(destination + at, source + at)
            at += 8
        while at < num_bytes:
            _move1(destination + at, source + at)
            at += 1

    return words


@intrinsic
def _stream64(context, destination, source):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        line = ir.VectorType(ir.IntType(64), 8).as_pointer()
        target, origin = (builder.inttoptr(argument, line) for argument in arguments)
        store = builder.store(builder.load(origin, align=8), target, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def _fence(context):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


def stream(destination: int, source: int, num_bytes: int) -> None:
    """Copy whole 64-byte lines past the caches, to an address that is a multiple of 64. `fence` before it is read."""
    ctypes.memmove(int(destination), int(source), int(num_bytes))


@overload(stream)
def _stream(destination, source, num_bytes):  # type: ignore[no-untyped-def]
    def lines(destination, source, num_bytes):  # type: ignore[no-untyped-def]
        for at in range(0, num_bytes, 64):
            _stream64(destination + at, source + at)

    return lines


def fence() -> None:
    """Everything stored so far is seen by every thread before what follows."""


@overload(fence)
def _fence_twin():  # type: ignore[no-untyped-def]
    return lambda: _fence()


@intrinsic
def _halve(context, destination, source):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        origin = builder.inttoptr(arguments[1], ir.IntType(64).as_pointer())
        builder.store(builder.trunc(builder.load(origin, align=8), ir.IntType(32)), target, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


def narrow(destination: int, source: int, count: int) -> None:
    """Copy int64 as int32, their low halves, between two addresses that do not overlap."""
    words = (ctypes.c_int64 * int(count)).from_address(int(source))
    (ctypes.c_int32 * int(count)).from_address(int(destination))[:] = list(words)


@overload(narrow)
def _narrow(destination, source, count):  # type: ignore[no-untyped-def]
    def halves(destination, source, count):  # type: ignore[no-untyped-def]
        for i in range(count):
            _halve(destination + 4 * i, source + 8 * i)

    return halves


@intrinsic
def _stream_halves(context, destination, source):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target = builder.inttoptr(arguments[0], ir.VectorType(ir.IntType(32), 16).as_pointer())
        origin = builder.inttoptr(arguments[1], ir.VectorType(ir.IntType(64), 16).as_pointer())
        halves = builder.trunc(builder.load(origin, align=8), ir.VectorType(ir.IntType(32), 16))
        store = builder.store(halves, target, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


def stream_narrow(destination: int, source: int, count: int) -> None:
    """`narrow`, past the caches, to an address that is a multiple of 4. `fence` before it is read."""
    narrow(destination, source, count)


@overload(stream_narrow)
def _stream_narrow(destination, source, count):  # type: ignore[no-untyped-def]
    def lines(destination, source, count):  # type: ignore[no-untyped-def]
        head = min(-destination % 64 // 4, count)
        for i in range(head):
            _halve(destination + 4 * i, source + 8 * i)
        end = head + (count - head) // 16 * 16
        for i in range(head, end, 16):
            _stream_halves(destination + 4 * i, source + 8 * i)
        for i in range(end, count):
            _halve(destination + 4 * i, source + 8 * i)

    return lines


PREFETCH_BYTES = 64
"""Bytes that one prefetch brings: a cache line."""


def prefetch(address: int) -> None:
    """Ask for the cache line at an address, into the second-level cache. A hint: any address is allowed."""


@intrinsic
def _prefetch_line(context, address):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        declared = ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, declared, "llvm.prefetch.p0")
        flags = [ir.Constant(int32, flag) for flag in (0, 1, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *flags])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@overload(prefetch)
def _prefetch(address):  # type: ignore[no-untyped-def]
    return lambda address: _prefetch_line(address)


def _atomic(bits: int, kind: Any) -> tuple[Any, Any]:
    """Acquire load and release store of a naturally aligned integer at an address."""
    word = ir.IntType(bits)

    @intrinsic
    def load(context, address):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.load_atomic(builder.inttoptr(arguments[0], word.as_pointer()), "acquire", bits // 8)

        return kind(types.int64), emit

    @intrinsic
    def store(context, address, value):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            narrow = arguments[1] if bits == 64 else builder.trunc(arguments[1], word)
            pointer = builder.inttoptr(arguments[0], word.as_pointer())
            builder.store_atomic(narrow, pointer, "release", bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return load, store


_load8, _store8 = _atomic(8, types.int8)
_load32, _store32 = _atomic(32, types.uint32)
_load64, _store64 = _atomic(64, types.int64)


def load8(address: int) -> int:
    """int8 at an address, with acquire order."""
    return ctypes.c_int8.from_address(int(address)).value


def store8(address: int, value: int) -> None:
    """Store an int8 with release order."""
    ctypes.c_int8.from_address(int(address)).value = int(value)


def load32(address: int) -> int:
    """uint32 at an address as int64, with acquire order."""
    return ctypes.c_uint32.from_address(int(address)).value


def store32(address: int, value: int) -> None:
    """Store the low 32 bits of a value with release order."""
    ctypes.c_uint32.from_address(int(address)).value = int(value) & 0xFFFFFFFF


def load64(address: int) -> int:
    """int64 at an address, with acquire order."""
    return ctypes.c_int64.from_address(int(address)).value


def store64(address: int, value: int) -> None:
    """Store an int64 with release order."""
    ctypes.c_int64.from_address(int(address)).value = int(value)


@overload(load8)
def _load8_twin(address):  # type: ignore[no-untyped-def]
    return lambda address: np.int64(_load8(address))


@overload(store8)
def _store8_twin(address, value):  # type: ignore[no-untyped-def]
    return lambda address, value: _store8(address, value)


@overload(load32)
def _load32_twin(address):  # type: ignore[no-untyped-def]
    return lambda address: np.int64(_load32(address))


@overload(store32)
def _store32_twin(address, value):  # type: ignore[no-untyped-def]
    return lambda address, value: _store32(address, value)


@overload(load64)
def _load64_twin(address):  # type: ignore[no-untyped-def]
    return lambda address: _load64(address)


@overload(store64)
def _store64_twin(address, value):  # type: ignore[no-untyped-def]
    return lambda address, value: _store64(address, value)


def syscall(number: int, a: int, b: int, c: int, d: int, e: int, f: int) -> int:
    """Enter the kernel; the result, or minus errno."""
    result = _libc.syscall(*(ctypes.c_long(int(word)) for word in (number, a, b, c, d, e, f)))
    return -ctypes.get_errno() if result < 0 else int(result)


@overload(syscall)
def _syscall(number, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
    def enter(number, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
        result = _c_syscall(number, a, b, c, d, e, f)
        if result < 0:
            return -np.int64(_load32(_c_errno()))
        return result

    return enter


def pread(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
    """Read at an offset into memory; the number of bytes read, or minus errno."""
    result = _libc.pread64(
        int(descriptor), ctypes.c_void_p(int(address)), ctypes.c_size_t(int(num_bytes)), ctypes.c_long(int(offset))
    )
    return -ctypes.get_errno() if result < 0 else int(result)


@overload(pread)
def _pread(descriptor, address, num_bytes, offset):  # type: ignore[no-untyped-def]
    def read(descriptor, address, num_bytes, offset):  # type: ignore[no-untyped-def]
        result = _c_pread(np.int32(descriptor), address, num_bytes, offset)
        if result < 0:
            return -np.int64(_load32(_c_errno()))
        return result

    return read


def lock(mutex: int) -> None:
    """Take a pthread mutex."""
    _libc.pthread_mutex_lock(ctypes.c_void_p(int(mutex)))


def unlock(mutex: int) -> None:
    """Give a pthread mutex back."""
    _libc.pthread_mutex_unlock(ctypes.c_void_p(int(mutex)))


def broadcast(condition: int) -> None:
    """Wake every thread that waits on a pthread condition variable."""
    _libc.pthread_cond_broadcast(ctypes.c_void_p(int(condition)))


@overload(lock)
def _lock(mutex):  # type: ignore[no-untyped-def]
    def take(mutex):  # type: ignore[no-untyped-def]
        _c_lock(mutex)

    return take


@overload(unlock)
def _unlock(mutex):  # type: ignore[no-untyped-def]
    def give(mutex):  # type: ignore[no-untyped-def]
        _c_unlock(mutex)

    return give


@overload(broadcast)
def _broadcast(condition):  # type: ignore[no-untyped-def]
    def wake(condition):  # type: ignore[no-untyped-def]
        _c_broadcast(condition)

    return wake


def clock_ns(scratch: Any, clock: int = 1) -> int:
    """Time of a POSIX clock in ns (1 monotonic, 0 real time); `scratch` is int64[2]."""
    _libc.clock_gettime(int(clock), ctypes.c_void_p(scratch.ctypes.data))
    return int(scratch[0]) * 1_000_000_000 + int(scratch[1])


@overload(clock_ns)
def _clock_ns(scratch, clock=1):  # type: ignore[no-untyped-def]
    def now(scratch, clock=1):  # type: ignore[no-untyped-def]
        _c_clock(np.int32(clock), scratch.ctypes.data)
        return scratch[0] * np.int64(1_000_000_000) + scratch[1]

    return now


def wait(condition: int, mutex: int, timeout_ns: int, scratch: Any) -> None:
    """Wait on a condition variable, mutex held, until woken or `timeout_ns` have passed; `scratch` is int64[2]."""
    until = clock_ns(scratch, 0) + int(timeout_ns)
    scratch[0], scratch[1] = until // 1_000_000_000, until % 1_000_000_000
    _libc.pthread_cond_timedwait(
        ctypes.c_void_p(int(condition)), ctypes.c_void_p(int(mutex)), ctypes.c_void_p(scratch.ctypes.data)
    )


@overload(wait)
def _wait(condition, mutex, timeout_ns, scratch):  # type: ignore[no-untyped-def]
    def sleep(condition, mutex, timeout_ns, scratch):  # type: ignore[no-untyped-def]
        until = clock_ns(scratch, 0) + timeout_ns
        scratch[0] = until // np.int64(1_000_000_000)
        scratch[1] = until % np.int64(1_000_000_000)
        _c_timedwait(condition, mutex, scratch.ctypes.data)

    return sleep
