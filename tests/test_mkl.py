"""MKL asks a function of its own whether it runs on Intel's processors; ours is asked instead."""

import os
import subprocess
import sys

import pytest

from metabatch_cli import mkl

ZEN_5 = {"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": " ".join(mkl.AVX512)}

only_linux = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="of Linux on x86-64"
)


def described(tmp_path, facts):
    """A file as Linux's, of two processors, the second an old one."""
    path = tmp_path / "cpuinfo"
    both = facts, {"vendor_id": "AuthenticAMD", "cpu family": "6", "flags": "fpu"}
    path.write_text(
        "\n".join("".join(f"{name}\t: {fact[name]}\n" for name in fact) for fact in both)
    )
    return str(path)


def python(code, switch):
    """What a fresh Python prints, and says on stderr."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MKL_")}
    env[mkl.SWITCH] = switch
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.split(), done.stderr


@only_linux
def test_the_library_has_functions_for_all_that_is_loaded_later():
    code = """
import ctypes
from metabatch_cli import mkl
mkl._load(mkl.library("an_answer", "another", "answer"))
everything = ctypes.CDLL(None)
print(everything.an_answer(), everything.another(), everything.answer())
print(hasattr(everything, "an"), mkl.avx512_enabled())
"""
    assert python(code, "0") == (["1", "1", "1", "False", "False"], "")


@only_linux
def test_it_is_not_taken_for_a_library_of_somebody_else_who_had_its_descriptor():
    code = """
import ctypes, os
from metabatch_cli import mkl
file = os.memfd_create("theirs")
os.write(file, mkl.library("their_answer"))
ctypes.CDLL(f"/proc/self/fd/{file}")
os.close(file)
mkl._load(mkl.library("an_answer"))
print(ctypes.CDLL(None).an_answer())
"""
    assert python(code, "0") == (["1"], "")


@only_linux
def test_no_descriptor_is_left():
    code = """
import os
from metabatch_cli import mkl
before = os.listdir("/proc/self/fd")
mkl._load(mkl.library("an_answer"))
print(os.listdir("/proc/self/fd") == before)
"""
    assert python(code, "0") == (["True"], "")


@only_linux
@pytest.mark.parametrize(
    ("changed", "family"),
    [
        ({}, 26),
        ({"cpu family": "25"}, 25),
        ({"cpu family": "unknown"}, 0),
        ({"vendor_id": "GenuineIntel"}, 0),
        ({"flags": "fpu avx2 avx512f"}, 0),
    ],
)
def test_the_family_is_told_of_amd_processors_with_avx_512(tmp_path, changed, family):
    assert mkl.family_with_avx512(described(tmp_path, ZEN_5 | changed)) == family


@pytest.mark.parametrize(("platform", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_it_is_for_linux_on_x86_64(tmp_path, monkeypatch, platform, machine):
    there = os.uname_result(("", "", "", "", machine))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "uname", lambda: there)
    assert not mkl.family_with_avx512(described(tmp_path, ZEN_5))


@pytest.mark.parametrize("content", [None, "", "nothing known\n"])
def test_nothing_is_known_of_a_processor_that_is_not_described(tmp_path, content):
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    assert not mkl.family_with_avx512(str(path))


@only_linux
@pytest.mark.parametrize("switch", ["0", "1", ""])
def test_mkl_uses_what_the_processor_can_where_that_is_wanted(switch):
    code = """
import metabatch_cli, torch
from ctypes import CDLL
from pathlib import Path
torch.ones(64, 64) @ torch.ones(64, 64)
try:
    of_torch = CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    print(of_torch.mkl_serv_cpu_detect(), metabatch_cli.mkl.avx512_enabled())
except (OSError, AttributeError):
    print("unknown", "unknown")
"""
    (kernels, enabled), warned = python(code, switch)
    if kernels == "unknown":
        pytest.skip("this torch has no MKL, or another, that does not tell")
    with open("/proc/cpuinfo") as file:
        processor = file.read().partition("\n\n")[0]
    family = mkl.family_with_avx512("/proc/cpuinfo")
    wanted = family and (switch == "1" or (switch == "" and family >= mkl.ZEN_5))
    assert enabled == str(bool(wanted))
    of_intel = "GenuineIntel" in processor and "avx512vl" in processor
    assert (kernels == "7") == bool(wanted or of_intel)
    assert warned == "" or (switch == "1" and "AMD's processors with AVX-512" in warned)


# --- what decides, as if on such a processor -----------------------------------------------------


def decided(tmp_path, switch, facts=ZEN_5, before=""):
    """Whether it is enabled in the end, and what is said; the library is loaded for good."""
    code = f"""
import os, sys, types
from metabatch_cli import mkl
os.environ["{mkl.SWITCH}"] = {switch!r}
mkl._load, load = lambda content: load(mkl.library(mkl.OURS)), mkl._load  # MKL is not told
{before}
mkl.enable_avx512({described(tmp_path, facts)!r})
print(mkl.avx512_enabled(), repr(os.environ["{mkl.SWITCH}"]))
"""
    (enabled, left), warned = python(code, "0")
    assert left == repr(switch)
    return enabled == "True", warned


@only_linux
@pytest.mark.parametrize(
    ("switch", "family", "enabled"),
    [
        ("", "26", True),
        ("", "27", True),
        ("", "25", False),
        ("1", "25", True),
        ("1", "26", True),
        ("0", "26", False),
    ],
)
def test_it_is_enabled_where_it_gains_or_is_asked_for(tmp_path, switch, family, enabled):
    facts = ZEN_5 | {"cpu family": family}
    assert decided(tmp_path, switch, facts) == (enabled, "")


@only_linux
@pytest.mark.parametrize("switch", ["1", ""])
@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("sys.modules['torch'] = types.ModuleType('torch')", "torch was imported before"),
        ("mkl._load = lambda content: open('/not/there')", "No such file or directory"),
        ("mkl._load = lambda content: None", "another library was loaded"),
    ],
)
def test_what_stands_in_the_way_is_told_to_whom_asked_for_it(tmp_path, switch, before, reason):
    enabled, warned = decided(tmp_path, switch, before=before)
    assert not enabled
    assert (reason in warned) == (switch == "1")


@only_linux
def test_another_processor_is_told_to_whom_asked_for_it(tmp_path):
    enabled, warned = decided(tmp_path, "1", ZEN_5 | {"vendor_id": "GenuineIntel"})
    assert not enabled
    assert "for AMD's processors with AVX-512" in warned


@only_linux
def test_a_switch_that_is_neither_0_nor_1_counts_as_none(tmp_path):
    enabled, warned = decided(tmp_path, "yes")
    assert enabled
    assert "METABATCH_MKL_AVX512='yes' is ignored: it may be 0 or 1" in warned


@only_linux
@pytest.mark.parametrize(
    "again",
    [
        "importlib.reload(metabatch_cli)",
        "[sys.modules.pop(name) for name in list(sys.modules) if 'metabatch' in name]",
    ],
)
def test_it_stays_known_when_the_package_is_imported_again(tmp_path, again):
    code = f"""
import importlib, os, sys, types
import metabatch_cli
from metabatch_cli import mkl
mkl._load(mkl.library(mkl.OURS))
sys.modules["torch"] = types.ModuleType("torch")
{again}
os.environ["{mkl.SWITCH}"] = "1"
from metabatch_cli import mkl
mkl.enable_avx512({described(tmp_path, ZEN_5)!r})
print(mkl.avx512_enabled())
"""
    assert python(code, "0") == (["True"], "")


# --- processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "0", "1"])
@pytest.mark.parametrize("enabled", [False, True])
def test_children_are_told_to_do_as_this_process_does(monkeypatch, before, enabled):
    monkeypatch.delenv(mkl.SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(mkl.SWITCH, before)
    monkeypatch.setattr(mkl, "avx512_enabled", lambda: enabled)
    with mkl.same_in_children():
        assert os.environ[mkl.SWITCH] == str(int(enabled))
    assert os.environ.get(mkl.SWITCH) == before


@pytest.mark.parametrize("main", [False, True])
def test_a_worker_that_computes_otherwise_is_refused(monkeypatch, main):
    monkeypatch.setattr(mkl, "avx512_enabled", lambda: main)
    mkl.require_same_as_main(main)
    monkeypatch.setattr(mkl, "avx512_enabled", lambda: not main)
    one, other = ("main process", "worker") if main else ("worker", "main process")
    with pytest.raises(RuntimeError, match=rf"in th\w+ {one} but not in th\w+ {other}.*=0 before"):
        mkl.require_same_as_main(main)
