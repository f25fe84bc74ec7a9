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

SWITCH = "METABATCH_MKL_AVX512"  # 0: never; 1: on any processor; unset: where it is known to gain
QUESTION = "mkl_serv_intel_cpu_true"
ZEN_5 = 26  # AMD's first family of processors whose units are 512 bits wide
ABILITIES = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}

_widened = False


def is_widened() -> bool:
    """Whether the library was loaded, here or in the process that this one is a fork of.

    Two processes of one machine that agree in this compute alike, to the bit.
    """
    return _widened


def widen(processors: str = "/proc/cpuinfo") -> None:
    """Load the library whose answer is yes, where that is wanted and torch is not loaded yet.

    What this process can't have, those that it starts shall not have either.

    Args:
        processors: the file in which Linux describes them.
    """
    global _widened
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "0", "1"):
        warnings.warn(f"{SWITCH}={wanted!r} is neither 0 nor 1, and says nothing", stacklevel=2)
    if wanted == "0" or not (wanted == "1" or gains(processors)):
        return
    hindrance = "torch was imported before metabatch_cli"
    if "torch" not in sys.modules:
        try:
            _load(library(QUESTION), QUESTION)
        except (OSError, AttributeError) as error:  # not Linux, or nothing is loaded from memory
            hindrance = str(error)
        else:
            _widened = True
            return
    if wanted == "1":
        warnings.warn(f"{SWITCH}=1 has no effect: {hindrance}", stacklevel=2)
    os.environ[SWITCH] = "0"


def refuse_other(parent: bool) -> None:
    """Raise RuntimeError if what `is_widened` says in the parent process is not so here."""
    if parent != is_widened():
        wide, narrow = ("its parent", "it") if parent else ("it", "its parent")
        raise RuntimeError(
            f"MKL may use AVX-512 in {wide} and not in {narrow}, so that this process would not "
            "compute to the last bit as its parent does: import metabatch_cli before torch in both "
            f"(in a forkserver too, where that preloads torch), or start both with {SWITCH}=0"
        )


def gains(processors: str) -> bool:
    """Whether this is Linux on an AMD processor with units of 512 bits."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return False
    facts = {}
    try:
        with open(processors) as file:
            for line in file:
                name, colon, value = line.partition(":")
                if not colon:
                    break  # the next processor
                facts[name.strip()] = value.strip()
    except OSError:
        return False
    family = facts.get("cpu family", "")
    return (
        facts.get("vendor_id") == "AuthenticAMD"
        and family.isdecimal()
        and int(family) >= ZEN_5
        and set(facts.get("flags", "").split()) >= ABILITIES
    )


def library(function: str) -> bytes:
    """A shared library for Linux on x86-64 with one function, of no arguments, that returns 1.

    Its first page is for reading and executing: headers, and one symbol with all that leads to it.
    Its second, which the loader may write to, says where these lie (System V ABI, chapters 4, 5).
    """
    code = b"\xb8\x01\x00\x00\x00\xc3"  # mov eax, 1; ret
    names = b"\0" + function.encode() + b"\0"
    at_symbols = 64 + 4 * 56
    at_hashes = at_symbols + 2 * 24
    at_names = at_hashes + 5 * 4
    at_code = at_names + len(names)
    end, page = at_code + len(code), 4096

    def segment(kind: int, rights: int, start: int, size: int) -> bytes:
        return struct.pack("<2I6Q", kind, rights, start, start, start, size, size, page)

    where = ((4, at_hashes), (5, at_names), (6, at_symbols), (10, len(names)), (11, 24), (0, 0))
    dynamic = b"".join(struct.pack("<2Q", *entry) for entry in where)
    read, write, execute = 4, 2, 1
    first = [
        struct.pack("<16s2HI3QI6H", b"\x7fELF\2\1\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0),
        segment(1, read | execute, 0, end),
        segment(1, read | write, page, len(dynamic)),
        segment(2, read | write, page, len(dynamic)),  # the table of where things lie
        segment(0x6474E551, read | write, 0, 0),  # a stack that is not executed
        bytes(24) + struct.pack("<I2BH2Q", 1, 0x12, 0, 1, at_code, len(code)),
        struct.pack("<5I", 1, 2, 1, 0, 0),  # one chain, of the one symbol
        names,
        code,
    ]
    return b"".join(first).ljust(page, b"\0") + dynamic


def _load(content: bytes, function: str) -> None:
    """Make a library's function known to all that are loaded later.

    Raises:
        OSError, AttributeError: it can't be loaded, or it has no such function.
    """
    file = os.memfd_create("mkl")
    try:
        os.write(file, content)
        # to the loader two files of one name are one: others come as /proc/self/fd/N too
        loaded = ctypes.CDLL(f"/proc/self/task/../fd/{file}", mode=ctypes.RTLD_GLOBAL)
        getattr(loaded, function)
    finally:
        os.close(file)
