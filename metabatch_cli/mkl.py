"""Lets MKL, which torch computes with on CPUs, use AVX-512 on AMD's processors too.

MKL chooses its kernels by what a processor can do, but on AMD's it stays at 256 bits. Whether it
runs on Intel's it asks a function of its own, `mkl_serv_intel_cpu_true`; one of that name in a
library that was loaded before it is asked instead (Daniël de Kok, "Intel MKL on AMD Zen", 2020,
danieldk.eu). Kernels are then chosen by the same abilities as on Intel's.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = "METABATCH_MKL_AVX512"  # 0: never; 1: where MKL would not use it; unset: where it gains
SYMBOL = "mkl_serv_intel_cpu_true"
OURS = "metabatch_mkl_avx512"  # in the same library: tells that it is loaded, whatever is reloaded
ZEN_5 = 26  # the family of AMD's processors of which some have units of 512 bits, and later ones
AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


def avx512_enabled() -> bool:
    """Whether MKL was told here, or before this process was forked, to use AVX-512 on AMD's."""
    return hasattr(ctypes.CDLL(None), OURS)


def enable_avx512(processors: str = "/proc/cpuinfo") -> None:
    """Tell MKL, where that is wanted and torch, which brings it, is not imported yet.

    Args:
        processors: the file in which Linux describes them.
    """
    if avx512_enabled():
        return
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "0", "1"):
        warnings.warn(f"{SWITCH}={wanted!r} is ignored: it may be 0 or 1", stacklevel=2)
        wanted = ""
    family = family_with_avx512(processors)
    if wanted == "0" or (wanted == "" and family < ZEN_5):
        return
    obstacle = None
    if not family:
        obstacle = "it is for AMD's processors with AVX-512, on Linux"
    elif "torch" in sys.modules:
        obstacle = "torch was imported before metabatch_cli"
    else:
        try:
            _load(library(SYMBOL, OURS))
        except OSError as error:
            obstacle = str(error)
        else:
            obstacle = None if avx512_enabled() else "another library was loaded instead"
    if wanted == "1" and obstacle:
        warnings.warn(f"{SWITCH}=1 has no effect: {obstacle}", stacklevel=2)


@contextmanager
def same_in_children() -> Iterator[None]:
    """Processes that are started meanwhile do as this one does, where they can."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = str(int(avx512_enabled()))
    try:
        yield
    finally:
        del os.environ[SWITCH]
        if before is not None:
            os.environ[SWITCH] = before


def require_same_as_main(main: bool) -> None:
    """Raise RuntimeError if `avx512_enabled` says something else here than in the main process."""
    here = avx512_enabled()
    if here != main:
        raise RuntimeError(
            f"MKL may use AVX-512 in {'this worker' if here else 'the main process'} but not in "
            f"{'the main process' if here else 'this worker'}, and batches could differ in their "
            "last bits: import metabatch_cli before torch at the top of the script (and in what a "
            f"forkserver preloads), or set {SWITCH}=0 before Python starts"
        )


def family_with_avx512(processors: str) -> int:
    """The family of an AMD processor with AVX-512, on Linux; 0 for anything else."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return 0
    facts = {}
    try:
        with open(processors) as file:
            for line in file:
                name, colon, value = line.partition(":")
                if not colon:
                    break  # the next processor
                facts[name.strip()] = value.strip()
    except OSError:
        return 0
    of_amd = facts.get("vendor_id") == "AuthenticAMD"
    family = facts.get("cpu family", "")
    able = set(facts.get("flags", "").split()) >= AVX512
    return int(family) if of_amd and able and family.isdecimal() else 0


def library(*functions: str) -> bytes:
    """A shared library for Linux on x86-64 with functions, of no arguments, that return 1.

    Its first page is for reading and executing: headers, and symbols with all that leads to them.
    Its second, which the loader may write to, says where these lie (System V ABI, chapters 4, 5).
    """
    code = b"\xb8\x01\x00\x00\x00\xc3"  # mov eax, 1; ret
    names = b"\0" + b"".join(function.encode() + b"\0" for function in functions)
    count = len(functions)
    hashes = struct.pack(f"<{4 + count}I", 1, 1 + count, 1, 0, *range(2, count + 1), 0)  # one chain
    at_symbols = 64 + 4 * 56
    at_hashes = at_symbols + (1 + count) * 24
    at_names = at_hashes + len(hashes)
    at_code = at_names + len(names)
    end, page = at_code + len(code), 4096

    def segment(kind: int, rights: int, start: int, size: int) -> bytes:
        return struct.pack("<2I6Q", kind, rights, start, start, start, size, size, page)

    def symbol(function: str) -> bytes:
        name = names.index(b"\0" + function.encode() + b"\0") + 1
        return struct.pack("<I2BH2Q", name, 0x12, 0, 1, at_code, len(code))

    where = ((4, at_hashes), (5, at_names), (6, at_symbols), (10, len(names)), (11, 24), (0, 0))
    dynamic = b"".join(struct.pack("<2Q", *entry) for entry in where)
    read, write, execute = 4, 2, 1
    first = [
        struct.pack("<16s2HI3QI6H", b"\x7fELF\2\1\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0),
        segment(1, read | execute, 0, end),
        segment(1, read | write, page, len(dynamic)),
        segment(2, read | write, page, len(dynamic)),  # the table of where things lie
        segment(0x6474E551, read | write, 0, 0),  # a stack that is not executed
        bytes(24),
        *map(symbol, functions),
        hashes,
        names,
        code,
    ]
    return b"".join(first).ljust(page, b"\0") + dynamic


def _load(content: bytes) -> None:
    """Make a library's functions known to all that are loaded later.

    Raises:
        OSError: the system does not let it be loaded.
    """
    file = os.memfd_create("mkl")
    try:
        os.write(file, content)
        # to the loader two files of one name are one, and others come as /proc/self/fd/N too
        ctypes.CDLL(f"/proc/self/task/../fd/{file}", mode=ctypes.RTLD_GLOBAL)
    finally:
        os.close(file)
