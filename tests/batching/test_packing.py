"""Packing: a batch that arrives is the batch that was sent, wherever it travelled."""

from __future__ import annotations

import itertools
import math
import re
import threading
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, fields, is_dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metabatch_cli.batching import Task, digest
from metabatch_cli.batching.packing import (
    ALIGNMENT,
    EachAlone,
    HostMemory,
    Packer,
    TorchMemory,
    empty,
    unpack,
)
from metabatch_cli.batching.task import tree_map

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = sorted(
    {
        kind
        for kind in vars(torch).values()
        if isinstance(kind, torch.dtype)
        and not re.search(r"\.(q|bits|u?int[1-7]$)", str(kind))  # quantised, packed
    },
    key=str,
)


class Pair(NamedTuple):
    left: Any
    right: Any = 3


Untyped = namedtuple("Untyped", "first second")


@dataclass
class Plain:
    values: Any
    name: str = "plain"
    more: dict = field(default_factory=dict)


class Custom:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside: Any) -> None:
        self.inside = inside


def opened(tree: Any) -> Any:
    """The same tree with what `digest` takes for a leaf opened up, and types named."""
    if isinstance(tree, Tensor):
        return bits(tree)
    if is_dataclass(tree):
        return type(tree).__name__, {f.name: opened(getattr(tree, f.name)) for f in fields(tree)}
    if isinstance(tree, (Custom, Slotted)):
        return type(tree).__name__, opened(tree.inside)
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return type(tree).__name__, [(key, opened(value)) for key, value in items]
    if isinstance(tree, np.ndarray):
        return tree.dtype.str, tree.shape, tree.tolist() if tree.dtype == object else tree.tobytes()
    return type(tree).__name__, repr(tree)


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def make(kind: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor of any type, made of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * kind.itemsize
    raw = torch.randint(2 if kind is torch.bool else 256, (count,), generator=generator)
    return raw.to(torch.uint8).view(kind).view(shape)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
VIEWS = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1) if t.dim() > 1 else t,
    "strided": lambda t: t[::2] if t.dim() else t,
    "inner": lambda t: t[..., 1:] if t.dim() else t,
    "expanded": lambda t: t.expand(3, *t.shape),
    "conjugated": lambda t: t.conj(),
    "negated": lambda t: t.conj().imag if t.dtype in (torch.complex64, torch.complex128) else t,
    "real part": lambda t: t.real if t.dtype in (torch.complex64, torch.complex128) else t,
    "channels last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
}
TENSORS = st.builds(
    lambda kind, shape, seed, view: VIEWS[view](make(kind, shape, seed)),
    st.sampled_from(DTYPES),
    SHAPES,
    st.integers(0, 99),
    st.sampled_from(sorted(VIEWS)),
)
ARRAY_TYPES = [*"?bBhHiIlLefdgFD", ">f8", ">i4", "M8[s]", "U5", "S3", "i4,f8", "O"]
ARRAYS = st.builds(
    lambda kind, shape, fortran, step: np.array(
        np.arange(math.prod(shape)).astype("i8").reshape(shape).astype(kind.replace("i4,f8", "i4"))
        if kind != "i4,f8"
        else np.zeros(shape, kind),
        order="F" if fortran else "C",
    )[..., ::step],
    st.sampled_from(ARRAY_TYPES),
    SHAPES.filter(len),
    st.booleans(),
    st.sampled_from([1, 2, -1]),
)
NUMBERS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([np.float32(3.5), np.int64(-1), Decimal("2.50"), 1 + 2j, torch.float16])
)
LEAVES = TENSORS | ARRAYS | NUMBERS


def grown(tree: st.SearchStrategy) -> st.SearchStrategy:
    return (
        st.lists(tree, max_size=3)
        | st.lists(tree, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), tree, max_size=3)
        | st.dictionaries(st.text(max_size=3), tree, max_size=3).map(OrderedDict)
        | st.builds(Pair, tree, tree)
        | st.builds(Untyped, tree, tree)
        | st.builds(Plain, tree, more=st.dictionaries(st.text(max_size=3), tree, max_size=2))
        | st.builds(Custom, tree)
        | st.builds(Slotted, tree)
        | st.builds(Task, tree, tree, tree, tree)
    )


TREES = st.recursive(LEAVES, grown, max_leaves=8)


def host(buffer: np.ndarray) -> HostMemory:
    return HostMemory(buffer)


def each_alone(buffer: np.ndarray) -> EachAlone:
    return EachAlone(buffer)


def in_torch(buffer: np.ndarray) -> TorchMemory:
    return TorchMemory(torch.from_numpy(buffer.copy()))


MEMORIES = [host, each_alone, in_torch]
every_memory = pytest.mark.parametrize("memory", MEMORIES)


def sent(batch: Any, size: int | None, memory: Any = host) -> Any:
    """What arrives of a batch through a segment of so many bytes."""
    packer = Packer()
    buffer = None if size is None else np.zeros(size, np.uint8)
    packer.fill(buffer)
    data = packer.pack(batch)
    return unpack(data, None if buffer is None else memory(buffer))


# --- what arrives ------------------------------------------------------------------------------


@every_memory
@pytest.mark.parametrize("size", [None, 200, 1 << 16])
@given(batch=TREES)
def test_any_tree_arrives_as_it_was_sent(memory, size, batch):
    assert opened(sent(batch, size, memory)) == opened(batch)


@every_memory
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_a_tensor_of_any_type_and_view_arrives(kind, memory):
    shapes = ((), (0,), (3,), (2, 0, 3), (2, 3, 4, 5))
    for size, view, shape in itertools.product((None, 1 << 16), VIEWS.values(), shapes):
        tensor = view(make(kind, shape, 1))
        arrived = sent(tensor, size, memory)
        assert bits(arrived) == bits(tensor)
        assert arrived.is_contiguous()


@every_memory
@pytest.mark.parametrize("kind", ARRAY_TYPES)
def test_an_array_of_any_type_arrives_also_where_torch_has_no_such_type(kind, memory):
    array = np.zeros((2, 3), kind) if kind == "i4,f8" else np.arange(6).reshape(2, 3).astype(kind)
    assert opened(sent(array, 1 << 16, memory)) == opened(array)


def test_digests_agree_as_the_promises_count_them():
    batch = {
        "wave": Task(*(torch.randn(4, n, 1) for n in (2, 2, 5, 5)), aux={"i": torch.arange(4)}),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "array": np.linspace(0, 1, 7),
        "name": "x",
    }
    for size in (None, 100, 1 << 16):
        assert digest(sent(batch, size)) == digest(batch)


def test_sparse_tensors_go_torchs_own_way():
    sparse = torch.eye(3).to_sparse()
    arrived = sent(sparse, 1 << 16)
    assert arrived.layout == torch.sparse_coo
    assert torch.equal(arrived.to_dense(), torch.eye(3))


def test_many_batches_share_one_segment_and_what_no_longer_fits_travels_in_the_bytes():
    packer, buffer = Packer(), np.zeros(2000, np.uint8)
    packer.fill(buffer)
    batches = [torch.full((50,), float(n)) for n in range(20)]  # 200 bytes each
    packed = [packer.pack(batch) for batch in batches]
    assert packer.inline > 0
    assert packer.outgoing.used >= 200
    assert packer.outgoing.used <= 2000 + ALIGNMENT
    memory = HostMemory(buffer)
    for batch, data in zip(batches, packed, strict=True):
        assert torch.equal(unpack(data, memory), batch)
    assert max(map(len, packed)) > 200 > min(map(len, packed))


def test_one_tensor_twice_in_a_batch_is_one_tensor_on_arrival():
    tensor = torch.arange(3)
    one, other = sent([tensor, tensor], 1 << 16)
    assert one is other


def test_a_packer_goes_on_after_what_it_could_not_pack():
    packer, buffer = Packer(), np.zeros(1 << 12, np.uint8)
    packer.fill(buffer)
    with pytest.raises(TypeError):
        packer.pack([torch.ones(3), lambda: 0])
    data = packer.pack([torch.ones(3), "x"])
    arrived = unpack(data, HostMemory(buffer))
    assert torch.equal(arrived[0], torch.ones(3))
    assert arrived[1] == "x"


class ReadsAnother:
    """Unpacks another batch while it is itself being unpacked."""

    def __reduce__(self) -> Any:
        return _read_another, ()


def _read_another() -> Tensor:
    return sent(torch.full((3,), 5.0), 1 << 12)


def test_unpacking_can_be_nested():
    other, tensor = sent((ReadsAnother(), torch.arange(4)), 1 << 12)
    assert torch.equal(other, torch.full((3,), 5.0))
    assert torch.equal(tensor, torch.arange(4))


# --- tensors that lie in the segment from the beginning ----------------------------------------


@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_what_was_allocated_by_empty_is_not_copied(kind):
    packer, buffer = Packer(), np.zeros(1 << 16, np.uint8)
    packer.fill(buffer)
    tensor = empty(4, 3, dtype=kind)
    tensor.copy_(make(kind, (4, 3), 2))
    used = packer.outgoing.used
    data = packer.pack({"whole": tensor, "part": tensor[1:3]})
    assert packer.outgoing.used == used
    assert packer.inline == 0
    arrived = unpack(data, HostMemory(buffer))
    assert bits(arrived["whole"]) == bits(tensor)
    assert bits(arrived["part"]) == bits(tensor[1:3])
    assert arrived["whole"].data_ptr() == tensor.data_ptr()


@given(
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6),
    size=st.sampled_from([None, 100, 300, 1 << 16]),
    view=st.sampled_from(["as it is", "transposed", "strided", "inner", "expanded"]),
)
def test_empty_may_be_mixed_with_anything(shapes, size, view):
    packer = Packer()
    buffer = None if size is None else np.zeros(size, np.uint8)
    packer.fill(buffer)
    for _ in range(2):
        batch = []
        for number, shape in enumerate(shapes):
            owned = empty(*shape)
            owned.copy_(torch.full(shape, float(number)))
            batch += [VIEWS[view](owned), owned + 1]
        expected = opened(tree_map(torch.clone, batch))
        data = packer.pack(batch)
        arrived = unpack(data, None if buffer is None else HostMemory(buffer))
        assert opened(arrived)[1] == expected[1]


def test_memory_of_another_segment_is_copied():
    one, other = Packer(), Packer()
    buffers = [np.zeros(1 << 12, np.uint8) for _ in range(2)]
    one.fill(buffers[0])
    early = empty(8).fill_(1)
    other.fill(buffers[1])
    late = empty(8).fill_(2)
    data = other.pack([early, late])
    buffers[0][:] = 255  # the first segment is written again
    assert [t.tolist() for t in unpack(data, HostMemory(buffers[1]))] == [[1.0] * 8, [2.0] * 8]


def test_outside_a_worker_empty_is_torchs():
    found = []

    def elsewhere() -> None:  # another thread fills nobody's segment
        found.append(empty(2, 3, dtype=torch.int64))

    packer = Packer()
    packer.fill(np.zeros(1 << 12, np.uint8))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found[0].shape == (2, 3)
    assert found[0].dtype == torch.int64
    assert not packer.outgoing.holds(found[0])
    assert packer.outgoing.used == 0


def test_what_does_not_fit_is_torchs_too():
    packer = Packer()
    packer.fill(np.zeros(64, np.uint8))
    assert empty(1000).shape == (1000,)
    assert packer.outgoing.used == 0


# --- tensors are their reader's own ------------------------------------------------------------


@every_memory
@pytest.mark.parametrize("size", [None, 150, 1 << 16])
@given(shapes=st.lists(SHAPES, min_size=2, max_size=5), chosen=st.integers(0, 4))
def test_writing_into_one_tensor_changes_no_other(memory, size, shapes, chosen):
    batch = [make(torch.float32, shape, n).nan_to_num() for n, shape in enumerate(shapes)]
    batch.append(batch[0].to(torch.bfloat16))
    arrived = sent(batch, size, memory)
    chosen %= len(arrived)
    before = [(bits(tensor), tensor._version) for tensor in arrived]
    arrived[chosen].fill_(3)
    for number, tensor in enumerate(arrived):
        if number != chosen:
            assert (bits(tensor), tensor._version) == before[number]


@every_memory
def test_what_autograd_saved_of_one_tensor_survives_writing_into_another(memory):
    x, y = sent([torch.ones(3), torch.ones(3)], 1 << 12, memory)
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * x).sum()
    y.add_(1)
    loss.backward()
    assert weight.grad.tolist() == [1.0] * 3


def test_a_tensor_that_is_kept_alone_keeps_no_other_in_memory():
    packer, buffer = Packer(), np.zeros(1 << 17, np.uint8)
    packer.fill(buffer)
    batch = [torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16), np.zeros(2)]
    data = packer.pack([*batch, torch.zeros(10_000)])
    there = weakref.ref(buffer)
    small, half, array, _ = unpack(data, EachAlone(buffer))
    packer.fill(None)
    del buffer, _
    assert there() is None
    assert opened([small, half, array]) == opened(batch)


# --- what cannot be sent -----------------------------------------------------------------------


class Refuses:
    def __reduce__(self) -> Any:
        raise ValueError("not for sale")


@pytest.mark.parametrize(
    ("thing", "why"),
    [
        (torch.ones(2, requires_grad=True) * 2, "with a graph: detach it"),
        (torch.ones(2, requires_grad=True), "with a graph: detach it"),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), "with a graph: detach it"),
        (torch.empty(2, device="meta"), "on meta"),
        (lambda: 0, "lambda"),
        (np.array([lambda: 0], dtype=object), "lambda"),
        (threading.Lock(), "lock"),
        (Refuses(), "not for sale"),
        ((n for n in range(3)), "generator"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("size", [None, 1 << 12])
def test_what_cannot_be_sent_is_a_type_error_that_says_why(thing, why, size):
    with pytest.raises(TypeError, match=r"a worker cannot send this dict .*" + why):
        sent({"fine": torch.ones(2), "wrong": [thing]}, size)
