"""What the operating system says about this process's memory, and the allocator that stands between.

On CPU the peak of a training step is the resident set, as the kernel counts it, and the allocator decides much of it.
Glibc keeps what was freed, tcmalloc hands it back. So this module knows which allocator answers `malloc`, how to make
it release what it holds, and where the limits are (RAM, cgroup v1 and v2). No torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Allocator = Literal["tcmalloc", "jemalloc", "glibc", "other"]

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_PROC = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")
# cgroup v1 says "no limit" with the largest multiple of a page that fits 63 bits.
_UNLIMITED = 1 << 62


_RAN_OUT = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "_STATUS_ALLOC_FAILED")


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error says that an allocator found no memory, on any device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _RAN_OUT)


def resident_bytes() -> int:
    """Resident set of this process, in bytes, as the kernel counts it now."""
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY)  # several times in a step: without a file object
        try:
            return int(os.read(statm, 128).split()[1]) * PAGE_BYTES
        finally:
            os.close(statm)
    except (OSError, IndexError, ValueError):
        return highest_resident_bytes()


def highest_resident_bytes() -> int:
    """Highest resident set since the process began or since `reset_highest_resident`, in bytes."""
    try:
        return _kilobytes(_PROC / "status", b"VmHWM:")
    except (OSError, LookupError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_highest_resident() -> bool:
    """Let the kernel forget the highest resident set. False where it does not: the peak is then the whole process's."""
    try:
        with open(_PROC / "clear_refs", "wb", buffering=0) as clear_refs:
            clear_refs.write(b"5")
    except OSError:
        return False
    # Some sandboxes take the write and do nothing.
    return highest_resident_bytes() <= resident_bytes() * 1.01 + (8 << 20)


def ram_bytes() -> int:
    """Physical memory of the machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES


def available_ram_bytes() -> int:
    """What the kernel could give out without swapping, in bytes."""
    try:
        return _kilobytes(Path("/proc/meminfo"), b"MemAvailable:")
    except (OSError, LookupError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES


def cgroup_limit_bytes(proc: Path = _PROC, root: Path = _CGROUPS) -> int | None:
    """Memory limit of this process's cgroup or of any above it, v1 or v2, in bytes; ``None`` without one."""
    limits = [_limit(folder, name) for folder, name, _ in _cgroup_folders(proc, root)]
    return min((limit for limit in limits if limit is not None), default=None)


def cgroup_free_bytes(proc: Path = _PROC, root: Path = _CGROUPS) -> int | None:
    """What is left under the tightest cgroup limit, not counting page cache that can go; ``None`` without one."""
    left: list[int] = []
    for folder, limit_name, usage_name in _cgroup_folders(proc, root):
        limit = _limit(folder, limit_name)
        if limit is None:
            continue
        try:
            used = int((folder / usage_name).read_text()) - _reclaimable_bytes(folder)
        except (OSError, ValueError):
            continue
        left.append(max(0, limit - used))
    return min(left, default=None)


def total_bytes() -> int:
    """Memory that this process may use at most: RAM or the cgroup limit, whichever is lower, in bytes."""
    limit = cgroup_limit_bytes()
    return ram_bytes() if limit is None else min(ram_bytes(), limit)


def free_bytes() -> int:
    """Memory that this process could still get, in bytes."""
    left = cgroup_free_bytes()
    return available_ram_bytes() if left is None else min(available_ram_bytes(), left)


def _kilobytes(path: Path, key: bytes) -> int:
    with open(path, "rb") as lines:
        for line in lines:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    raise LookupError(f"no {key.decode()} in {path}")


def _cgroup_folders(proc: Path, root: Path) -> list[tuple[Path, str, str]]:
    """The cgroup of this process and all above it, each with the names of its limit and usage files."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[Path, str, str]] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            bases, names = [root, root / "unified"], ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            bases, names = [root / "memory"], ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for base in bases:
            # In a container the path may be the host's, while the mount shows the container's own cgroup as the root.
            folder = base / path.lstrip("/")
            while folder != base:
                found.append((folder, *names))
                folder = folder.parent
            found.append((base, *names))
    return found


def _limit(folder: Path, name: str) -> int | None:
    try:
        text = (folder / name).read_text().strip()
        return None if text == "max" or int(text) >= _UNLIMITED else int(text)
    except (OSError, ValueError):
        return None


def _reclaimable_bytes(folder: Path) -> int:
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key in ("inactive_file", "total_inactive_file"):
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def allocator_path() -> str | None:
    """The library whose `malloc` this process calls, or ``None`` where /proc does not tell."""
    try:
        address = ctypes.cast(ctypes.CDLL(None).malloc, ctypes.c_void_p).value
        if address is None:
            return None
        with open(_PROC / "maps") as maps:
            for line in maps:
                fields = line.split(maxsplit=5)
                first, _, last = fields[0].partition("-")
                if int(first, 16) <= address < int(last, 16):
                    return fields[5].strip() if len(fields) == 6 else None
    except (OSError, AttributeError, ValueError):
        pass
    return None


@functools.cache
def allocator() -> Allocator:
    """Which allocator answers `malloc` in this process.

    Read from the address of `malloc`, not from the list of loaded libraries: some packages bring a jemalloc of their
    own that nobody else uses.
    """
    name = os.path.basename(allocator_path() or "")
    if "tcmalloc" in name:
        return "tcmalloc"
    if "jemalloc" in name:
        return "jemalloc"
    # A static build of Python has no libc.so of its own to show, but `malloc_trim` is glibc's.
    return "glibc" if name.startswith(("libc.so", "libc-2")) and _symbol("malloc_trim") else "other"


def release() -> bool:
    """Make the allocator hand back what it holds but nobody uses, so that `resident_bytes` is truthful.

    Returns:
        Whether the allocator could be asked.
    """
    return _releaser()()


def find_allocator() -> str | None:
    """Path of a tcmalloc that the dynamic loader could preload, or ``None``.

    Only the *minimal* library: the full one samples the heap and unwinds stacks.
    """
    machine = os.uname().machine
    folders = [f"/usr/lib/{machine}-linux-gnu", f"/lib/{machine}-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib"]
    folders += ["/usr/local/lib", *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]
    prefix = Path(sys.prefix)
    for folder in [*folders, str(prefix / "lib")]:
        for name in ("libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so"):
            path = Path(folder, name)
            if path.exists():
                return str(path)
    return None


def has_gpu() -> bool:
    """Whether this process can see an NVIDIA GPU, as far as the system tells without CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))


def preload_candidate() -> str | None:
    """The tcmalloc that a CPU training process should start under, or ``None`` if it should start as it is.

    ``None`` where the user opted out (`MEMFIT_ALLOCATOR=system`), chose an allocator already, trains on a GPU, or where
    there is none to load.
    """
    return None if has_gpu() or not may_preload() else find_allocator()


def may_preload() -> bool:
    """Whether another allocator may take the place of this process's: nobody chose one."""
    if os.environ.get("MEMFIT_ALLOCATOR") == "system" or not sys.platform.startswith("linux"):
        return False
    return allocator() == "glibc" and bool(sys.executable)


@functools.cache
def _releaser() -> Callable[[], bool]:
    kind = allocator()
    if kind == "tcmalloc" and (tcmalloc := _symbol("MallocExtension_ReleaseFreeMemory")):
        tcmalloc.restype = None
        return lambda: tcmalloc() is None
    if kind == "jemalloc" and (mallctl := _symbol("mallctl")):
        # 4096 is MALLCTL_ARENAS_ALL.
        return lambda: bool(mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0)) == 0)
    if kind == "glibc" and (trim := _symbol("malloc_trim")):
        # 1 says that something was released, 0 that there was nothing to release: both are answers.
        return lambda: trim(ctypes.c_size_t(0)) in (0, 1)
    return lambda: False


def _symbol(name: str) -> ctypes._NamedFuncPointer | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None
