"""MKL asks a function of its own whether it runs on Intel's processors; ours is asked instead."""

import os
import subprocess
import sys

import pytest

from metabatch_cli import mkl

ZEN_5 = {"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": " ".join(mkl.ABILITIES)}

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
def test_the_library_has_a_function_for_all_that_is_loaded_later():
    code = """
import ctypes
from metabatch_cli import mkl
mkl._load(mkl.library("an_answer"), "an_answer")
print(ctypes.CDLL(None).an_answer())
"""
    assert python(code, "0") == (["1"], "")


@only_linux
def test_a_library_without_the_function_is_no_help():
    with pytest.raises(AttributeError, match="another_answer"):
        mkl._load(mkl.library("an_answer_of_no_use"), "another_answer")


@only_linux
def test_it_is_not_taken_for_a_library_of_somebody_else_who_had_its_descriptor():
    code = """
import ctypes, os
file = os.memfd_create("theirs")
from metabatch_cli import mkl
os.write(file, mkl.library("their_answer"))
ctypes.CDLL(f"/proc/self/fd/{file}")
os.close(file)
mkl._load(mkl.library("an_answer"), "an_answer")
print(ctypes.CDLL(None).an_answer())
"""
    assert python(code, "0") == (["1"], "")


@only_linux
@pytest.mark.parametrize(
    ("changed", "gains"),
    [
        ({}, True),
        ({"cpu family": "27"}, True),
        ({"cpu family": "25"}, False),
        ({"cpu family": "unknown"}, False),
        ({"vendor_id": "GenuineIntel"}, False),
        ({"flags": "fpu avx2 avx512f"}, False),
    ],
)
def test_it_is_for_processors_where_it_is_known_to_gain(tmp_path, changed, gains):
    assert mkl.gains(described(tmp_path, ZEN_5 | changed)) is gains


@pytest.mark.parametrize(("platform", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_it_is_for_linux_on_x86_64(tmp_path, monkeypatch, platform, machine):
    there = os.uname_result(("", "", "", "", machine))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "uname", lambda: there)
    assert not mkl.gains(described(tmp_path, ZEN_5))


@pytest.mark.parametrize("content", [None, "", "nothing known\n"])
def test_nothing_is_known_of_a_processor_that_is_not_described(tmp_path, content):
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    assert not mkl.gains(str(path))


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
    print(of_torch.mkl_serv_cpu_detect())
except (OSError, AttributeError):
    print("unknown")
"""
    (kernels,), warned = python(code, switch)
    if kernels == "unknown":
        pytest.skip("this torch has no MKL, or another, that does not tell")
    with open("/proc/cpuinfo") as file:
        processor = file.read().partition("\n\n")[0]
    if "avx512vl" not in processor:
        pytest.skip("this processor has no AVX-512")
    wanted = switch == "1" or (switch == "" and mkl.gains("/proc/cpuinfo"))
    assert (kernels == "7") == (wanted or "GenuineIntel" in processor)
    assert warned == ""


@only_linux
@pytest.mark.parametrize("switch", ["1", ""])
def test_what_comes_too_late_for_a_process_is_not_for_its_children_either(tmp_path, switch):
    code = f"""
import os, sys, types
sys.modules["torch"] = types.ModuleType("torch")
from metabatch_cli import mkl
mkl.widen({described(tmp_path, ZEN_5)!r})
print(mkl.is_widened(), os.environ[mkl.SWITCH])
"""
    said, warned = python(code, switch)
    assert said == ["False", "0"]
    assert ("torch was imported before metabatch_cli" in warned) == (switch == "1")


def test_a_switch_that_says_neither_yes_nor_no_is_told_so(monkeypatch):
    monkeypatch.setenv(mkl.SWITCH, "yes")
    with pytest.warns(UserWarning, match="'yes' is neither 0 nor 1"):
        mkl.widen(os.devnull)


@pytest.mark.parametrize("error", [OSError("not permitted"), AttributeError("no memfd_create")])
def test_nothing_happens_where_nothing_can_be_loaded_from_memory(monkeypatch, error):
    def refuse(content, function):
        raise error

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv(mkl.SWITCH, "1")
    monkeypatch.setattr(mkl, "_load", refuse)
    monkeypatch.setattr(mkl, "_widened", False)
    with pytest.warns(UserWarning, match=f"no effect: {error}"):
        mkl.widen()
    assert not mkl.is_widened()
    assert os.environ[mkl.SWITCH] == "0"


def test_what_is_loaded_is_known(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv(mkl.SWITCH, "1")
    monkeypatch.setattr(mkl, "_load", lambda content, function: None)
    monkeypatch.setattr(mkl, "_widened", False)
    mkl.widen()
    assert mkl.is_widened()
    assert os.environ[mkl.SWITCH] == "1"


@pytest.mark.parametrize("parent", [False, True])
def test_a_process_that_computes_otherwise_than_its_parent_is_refused(monkeypatch, parent):
    monkeypatch.setattr(mkl, "_widened", parent)
    mkl.refuse_other(parent)
    monkeypatch.setattr(mkl, "_widened", not parent)
    where = "in its parent and not in it," if parent else "in it and not in its parent,"
    with pytest.raises(RuntimeError, match=f"AVX-512 {where}.*{mkl.SWITCH}=0"):
        mkl.refuse_other(parent)
