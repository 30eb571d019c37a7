"""Random damage to a checkpoint: it is refused in one line, or it reads as before. Never anything else.

What no reader can see is left out. Two tensors of the same shape and type whose names or offsets are exchanged, a type
that is replaced by another of the same width (BF16, F16), and other bytes in the tensors themselves are all valid
checkpoints of other weights. The damage here changes one place of a header, the index or config.json at a time, or
its bytes without aim, which makes none of these: an exchange takes two changes, and what became F16 is passed over.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_slim.checkpoint.huggingface import CONFIG, INDEX, HFCheckpoint
from megatron_slim.checkpoint.raw_files import as_bytes
from megatron_slim.errors import SlimError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

Limits: TypeAlias = Callable[[], AbstractContextManager[Any]]
Content: TypeAlias = dict[str, tuple[str, tuple[int, ...], bytes]]
Step: TypeAlias = str | int
SHAPE = tiny_shape(
    num_layers=1,
    layer_types=("full_attention",),
    hidden_size=8,
    vocab_size=8,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=8,
    num_moe_experts=2,
    moe_ffn_hidden_size=8,
    moe_shared_expert_intermediate_size=8,
    mtp_num_layers=0,
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NEW_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", [], {}, [[]], {"x": 1}, "BF16", "F32", "F8_E4M3", "I64", "../x.safetensors", "\0"),
    *(0, 1, -1, 2, 3, 8, 2**31, 2**31 - 1, 2**32, 2**62, 2**63, 2**64, 10**300, -(10**300), 10**500),
    *(0.0, 0.5, -0.0, 1e-320, 1.7e308, -1.7e308, float("inf"), float("nan")),
    *SHARDS,
)
MARK = "a key that stands for the one before"
FEW = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)


class Victim:
    """A checkpoint whose files are damaged one at a time, and what it holds while none is."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = path, limits
        self.files = {file.name: file.read_bytes() for file in path.iterdir()}
        self.content = self.read()

    def read(self) -> Content:
        """All of it, within limits of time and memory."""
        with self._limits():
            checkpoint = HFCheckpoint.open(self.path)
            tensors = {name: checkpoint.read(name) for name in checkpoint.names}
        return {name: (str(t.dtype), tuple(t.shape), bytes(as_bytes(t))) for name, t in tensors.items()}

    def check(self, name: str, data: bytes) -> None:
        """The property, with this content of a file."""
        assume(b'"F16"' not in data)
        file = self.path / name
        file.write_bytes(data)
        try:
            assert self.read() == self.content
        except SlimError as error:
            assert str(error).isprintable() and str(self.path) in str(error)
            assert len(str(error)) < 5000
        finally:
            file.write_bytes(self.files[name])


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory, limits: Limits) -> Victim:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("victim") / "hf", SHAPE)
    assert sorted(file.name for file in path.glob("*.safetensors")) == list(SHARDS)
    return Victim(path, limits)


def split(data: bytes) -> tuple[bytes, bytes]:
    """Header and tensors of a shard."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def join(header: bytes, tensors: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


@st.composite
def mangled(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with up to three places changed, removed, inserted or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        more = draw(st.integers(0, 12))
        kind = draw(st.sampled_from(("flip", "delete", "insert", "repeat", "splice")))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "delete":
            data = data[:at] + data[at + more :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=12)) + data[at:]
        elif kind == "repeat":
            data = data[:at] + data[at : at + more] + data[at:]
        elif kind == "splice":
            source = draw(st.integers(0, len(data)))
            data = data[:at] + data[source : source + more] + data[at + more :]
    return data


def places(value: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """The way to every value inside a JSON value."""
    for step in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, step)
        yield from places(value[step], (*path, step))


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """JSON with one value replaced, changed by a little, dropped or doubled, or with one key renamed or twice."""
    parsed = json.loads(data)
    *way, last = draw(st.sampled_from(list(places(parsed))))
    holder = parsed
    for step in way:
        holder = holder[step]
    value = holder[last]
    kind = draw(st.sampled_from(("replace", "shift", "drop", "double", "rename")))
    if kind == "replace":
        holder[last] = draw(st.sampled_from(NEW_VALUES))
    elif kind == "shift":
        holder[last] = value + draw(st.sampled_from((-8, -1, 1, 8, 128))) if type(value) in (int, float) else [value]
    elif kind == "drop":
        del holder[last]
    elif isinstance(holder, list):
        holder.insert(int(last), value)
    elif kind == "double":
        holder[MARK] = draw(st.sampled_from((value, *NEW_VALUES)))
    else:
        name = draw(st.sampled_from(("", "x", f"{last}x", "__metadata__", "mtp.layers.9", "\ud800", *holder)))
        holder[name] = holder.pop(last)
    return json.dumps(parsed).replace(json.dumps(MARK), json.dumps(last)).encode()


@FEW
@given(data=st.data())
def test_header_of_other_bytes(victim: Victim, data: st.DataObject) -> None:
    """With its length put right, so that the JSON is what is looked at."""
    shard = data.draw(st.sampled_from(SHARDS))
    header, tensors = split(victim.files[shard])
    victim.check(shard, join(data.draw(mangled(header)), tensors))


@FEW
@given(data=st.data())
def test_header_of_other_values(victim: Victim, data: st.DataObject) -> None:
    shard = data.draw(st.sampled_from(SHARDS))
    header, tensors = split(victim.files[shard])
    victim.check(shard, join(data.draw(changed(header)), tensors))


@FEW
@given(data=st.data())
def test_start_of_a_shard(victim: Victim, data: st.DataObject) -> None:
    """Length and header, the one not right for the other."""
    shard = data.draw(st.sampled_from(SHARDS))
    header, tensors = split(victim.files[shard])
    start = data.draw(mangled(victim.files[shard][: 8 + min(len(header), data.draw(st.integers(0, 200)))]))
    victim.check(shard, start + header[len(start) - 8 :] + tensors)


@FEW
@given(data=st.data())
@pytest.mark.parametrize("name", [INDEX, CONFIG])
def test_json_of_other_bytes(victim: Victim, name: str, data: st.DataObject) -> None:
    victim.check(name, data.draw(mangled(victim.files[name])))


@FEW
@given(data=st.data())
@pytest.mark.parametrize("name", [INDEX, CONFIG])
def test_json_of_other_values(victim: Victim, name: str, data: st.DataObject) -> None:
    victim.check(name, data.draw(changed(victim.files[name])))


@FEW
@given(data=st.data())
def test_files_of_other_sizes(victim: Victim, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from((*SHARDS, INDEX, CONFIG)))
    whole = victim.files[name]
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    victim.check(name, cut if data.draw(st.booleans()) else whole + data.draw(st.binary(max_size=64)))


@FEW
@given(data=st.data())
def test_files_in_each_other_s_place(victim: Victim, data: st.DataObject) -> None:
    """Any file with the content of any other, whole or cut."""
    name, other = data.draw(st.permutations(tuple(victim.files)))[:2]
    whole = victim.files[other]
    victim.check(name, whole[: data.draw(st.sampled_from((len(whole), len(whole) // 2, 0)))])


def test_the_damage_does_damage(victim: Victim) -> None:
    """What makes the tests above mean something: a checkpoint of other weights is distinguished from this one."""
    header, tensors = split(victim.files[SHARDS[0]])
    (victim.path / SHARDS[0]).write_bytes(join(header, tensors[:-1] + bytes([tensors[-1] ^ 1])))
    other = victim.read()
    (victim.path / SHARDS[0]).write_bytes(victim.files[SHARDS[0]])
    assert [name for name in other if other[name] != victim.content[name]] and victim.read() == victim.content
