"""A limit on the heap of this process that gives way (tcmalloc).

What an allocator holds but nobody uses is part of the resident set. tcmalloc can be told a limit: then an allocation
that would go over it first hands free memory back, as much as it needs and no more. Nothing else holds a budget as
cheaply: handing memory back beforehand costs page faults on a guess, and still misses what is too scattered for use.

But where all that is free is not enough, the allocation fails. A training step must not die of that, so a *new handler*
(which C++ calls when an allocation has failed, before it tries again) takes the limit away. It may run in any thread,
with or without Python's lock and in the middle of anything, so it must not be Python. It is a few instructions, written
into a page of their own, as ctypes does for every callback. Elsewhere than on x86-64 there is no limit.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import sys

from memfit import host

_LIMIT = b"tcmalloc.heap_limit_mb"
_MIB = 2**20


class Heap:
    """The heap of a process under tcmalloc."""

    def __init__(self) -> None:
        """Raises `OSError` or `AttributeError` where tcmalloc, its limit or the handler cannot be had."""
        library = ctypes.CDLL(None)
        self._read = library.MallocExtension_GetNumericProperty
        self._write = library.MallocExtension_SetNumericProperty
        self._set_new_mode = library.tc_set_new_mode
        self._set_new_handler = library._ZSt15set_new_handlerPFvvE
        self._set_new_handler.argtypes = [ctypes.c_void_p]
        self._set_new_handler.restype = ctypes.c_void_p
        self._handler = _Lifter(self._write, self._set_new_handler)
        self._other: int | None = None  # somebody else's handler
        self._outside = 0
        self._number(_LIMIT)

    def limit(self, size: int) -> None:
        """Let the process hold ``size`` bytes at most from now on, for as long as that is possible."""
        self._outside = max(self._outside, self._outside_now())
        self._write(_LIMIT, ctypes.c_size_t(max(1, (size - self._outside) // _MIB)))
        self._install(self._handler.address)
        self._set_new_mode(1)

    def lift(self) -> None:
        """Take the limit away."""
        self._write(_LIMIT, ctypes.c_size_t(0))
        self._set_new_mode(0)
        self._install(None)
        if self._other is not None:
            self._set_new_handler(self._other)

    def settle(self) -> None:
        """All that was free has just been handed back: what is resident beside the heap can be read.

        Later readings only raise it. What the heap has taken and nobody has written to yet is not resident, so that
        they come out too low, by 32 MiB in one of six runs.
        """
        self._outside = max(0, self._outside_now())

    def return_at_once(self, on: bool) -> None:
        """Hand back whatever is freed, when it is freed: the resident set is then what is alive. Slow."""
        self._write(b"tcmalloc.aggressive_memory_decommit", ctypes.c_size_t(on))

    @property
    def limit_bytes(self) -> int:
        """How much of the process's limit is the heap's; 0 without one."""
        return self._number(_LIMIT) * _MIB

    @property
    def limited(self) -> bool:
        """Whether a limit is in force."""
        return self.limit_bytes > 0

    def resident_bytes(self) -> int:
        """What the heap holds of the resident set, used or free, in bytes."""
        return self._number(b"generic.heap_size") - self._number(b"tcmalloc.pageheap_unmapped_bytes")

    def _outside_now(self) -> int:
        return host.resident_bytes() - self.resident_bytes()

    def _install(self, handler: int | None) -> None:
        before = self._set_new_handler(handler)
        if before is not None and before != self._handler.address:
            self._other = before

    def _number(self, name: bytes) -> int:
        value = ctypes.c_size_t()
        if not self._read(name, ctypes.byref(value)):
            raise OSError(f"tcmalloc does not know {name.decode()}")
        return value.value


class _Lifter:
    """Machine code of a new handler that takes the limit and itself away, so that the next failure is a real one."""

    def __init__(self, write: ctypes._NamedFuncPointer, set_new_handler: ctypes._NamedFuncPointer) -> None:
        if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
            raise OSError("the handler is written for x86-64")
        self._name = ctypes.create_string_buffer(_LIMIT)
        code = b"".join(
            [
                b"\x48\x83\xec\x08",  # sub rsp, 8: calls want the stack aligned to 16 bytes
                b"\x48\xbf" + _address(self._name),  # mov rdi, name
                b"\x31\xf6",  # xor esi, esi
                b"\x48\xb8" + _address(write),  # mov rax, MallocExtension_SetNumericProperty
                b"\xff\xd0",  # call rax
                b"\x31\xff",  # xor edi, edi
                b"\x48\xb8" + _address(set_new_handler),  # mov rax, std::set_new_handler
                b"\xff\xd0",  # call rax
                b"\x48\x83\xc4\x08",  # add rsp, 8
                b"\xc3",  # ret
            ]
        )
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._page.write(code)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if protect(self.address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "this system allows no code of ours")


def _address(what: ctypes.Array[ctypes.c_char] | ctypes._NamedFuncPointer) -> bytes:
    value = ctypes.cast(what, ctypes.c_void_p).value
    assert value is not None
    return value.to_bytes(8, "little")


@functools.cache
def heap() -> Heap | None:
    """The heap, where it can be limited."""
    if host.allocator() != "tcmalloc":
        return None
    try:
        return Heap()
    except (OSError, AttributeError):
        return None
