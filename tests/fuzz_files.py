"""Damaged files, made at random: each must be refused in a sentence that names it, or load into a model that makes
sense. A few hundred run in test_tensor_file.py; many: python -m tests.fuzz_files --count 10000 [--seed 0] [--only ours]
"""
from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.commands.sources import quiet_libraries
from nunchaku_py.swap import quantized_sites
from tests.fuzz_seeds import SEEDS

Load = Callable[[Path], Any]
Mutation = Callable[[bytes, random.Random], bytes]
SECONDS = 20  # a file that takes longer hangs
GROWTH = 3 * 2**30  # bytes that one file may add to the peak memory
LONGEST = 1000  # characters of a refusal
_FAILURES = 10  # after so many there is enough to mend
WEIRD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 64, 2**16, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "0", "I64", "BF16", "F4", "U8", "\u0000\n", "ü", "\ud800", [], [[]], {}, {"a": {}}, [0],
    [1, 2], [-1, 4], [0, 2**62], [2**40, 2**40], [1.0], ["1"], [None], [True, False], [1] * 100, "a" * 5000,
)


# ------------------------------------------------------------------------------------------------------------ mutations
def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes; half of them to what the header says."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        how = rng.choice(_BYTES if rng.random() < 0.3 else _HEADERS)
        data = how(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    top = min(len(out), rng.choice((8, 2000, len(out))))
    for _ in range(rng.choice((1, 1, 8))):
        if top:
            out[rng.randrange(top)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[:rng.choice((rng.randrange(16), rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(64))))]


def _extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 100)))


def _splice(data: bytes, rng: random.Random) -> bytes:
    """A piece of the file stands elsewhere as well, over what was there or before it."""
    if not data:
        return data
    start, to, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 200)
    piece = data[start:start + size]
    return data[:to] + piece + data[to + (len(piece) if rng.random() < 0.5 else 0):]


def _length(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    new = rng.choice((0, 1, length - 1, length + 1, length + 8, len(data), len(data) - 8, 2**31, 2**63,
                      rng.getrandbits(64)))
    return struct.pack("<Q", new % 2**64) + data[8:]


def _noise(data: bytes, rng: random.Random) -> bytes:
    """Tensors of other numbers: NaN and infinities among them."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice((b"\xff", b"\x7f\x80", b"\0", b"\x80\x7f")) * 32 + data[start + 64:]


def _of_header(change: Callable[[dict[str, Any], random.Random], None]) -> Mutation:
    """A mutation of the parsed header; of a file whose header is broken already, a flipped bit."""

    def mutation(data: bytes, rng: random.Random) -> bytes:
        length = int.from_bytes(data[:8], "little")
        try:
            table = json.loads(data[8:8 + length])
            change(table, rng)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return _flip(data, rng)
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=rng.random() < 0.5).encode(errors="replace")
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[8 + length:]

    return mutation


def _tensor(table: dict[str, Any], rng: random.Random) -> str:
    return rng.choice([name for name in table if name != "__metadata__"])


def _entry_field(table: dict[str, Any], rng: random.Random) -> None:
    entry = table[_tensor(table, rng)]
    field = rng.choice(("dtype", "shape", "data_offsets"))
    kinds = ("I8", "U8", "F16", "I16", "U16", "F32", "F8_E4M3", "F8_E5M2", "BOOL", "C64", "F4", "F8_E8M0", "XX")
    entry[field] = rng.choice(kinds) if field == "dtype" and rng.random() < 0.7 else rng.choice(WEIRD)


def _entry_number(table: dict[str, Any], rng: random.Random) -> None:
    """Nearly right: another size, axis order or place."""
    entry = table[_tensor(table, rng)]
    numbers = entry[rng.choice(("shape", "data_offsets"))]
    how = rng.randrange(4)
    if how == 0:
        numbers.reverse()
    elif how == 1:
        numbers.append(1)
    elif how == 2:
        numbers.insert(0, 1)
    elif numbers:
        numbers[rng.randrange(len(numbers))] += rng.choice((-64, -1, 1, 64))


def _swap_entries(table: dict[str, Any], rng: random.Random) -> None:
    a, b = _tensor(table, rng), _tensor(table, rng)
    if rng.random() < 0.5:
        table[a], table[b] = table[b], table[a]
    else:
        field = rng.choice(("dtype", "shape", "data_offsets"))
        table[a][field], table[b][field] = table[b][field], table[a][field]


def _rename(table: dict[str, Any], rng: random.Random) -> None:
    name = _tensor(table, rng)
    other = rng.choice((name + "x", "", "..", name.replace("codes", "zeros"), _tensor(table, rng), "a\nb", "x" * 3000,
                        "\ud800", name.rpartition(".")[0]))
    table[other] = table.pop(name)


def _drop_or_add(table: dict[str, Any], rng: random.Random) -> None:
    name = _tensor(table, rng)
    if rng.random() < 0.5:
        del table[name]
    else:
        table[rng.choice(("extra", name + ".0"))] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def _metadata(table: dict[str, Any], rng: random.Random) -> None:
    if rng.random() < 0.2:
        table["__metadata__"] = rng.choice(WEIRD)
        return
    metadata = table["__metadata__"]
    key = rng.choice([*metadata, "shared"])
    names = [name for name in table if name != "__metadata__"]
    shared = {rng.choice((*names, "x")): rng.choice((*names, "y"))}
    metadata[key] = json.dumps(shared) if key == "shared" and rng.random() < 0.7 else rng.choice(
        (*WEIRD, "{", "[]", "null", "[" * 10000, '{"a":' * 5000))


def _config(table: dict[str, Any], rng: random.Random) -> None:
    """One place of a JSON value inside the metadata holds something else."""
    metadata = table["__metadata__"]
    key = rng.choice([key for key, value in metadata.items() if value.startswith("{")])
    value = json.loads(metadata[key])
    _change_somewhere(value, rng)
    metadata[key] = json.dumps(value)


def _change_somewhere(value: Any, rng: random.Random) -> None:
    inner = value
    while True:
        place = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not (isinstance(inner[place], dict | list) and inner[place] and rng.random() < 0.85):
            break
        inner = inner[place]
    old = inner[place]
    choice = rng.random()
    if choice < 0.15:
        del inner[place]
    elif choice < 0.3 and isinstance(inner, dict):
        added = ("x", "mode", "rank", "_class_name", "parts", "model_type", "sites", "rules", "num_labels")
        inner[rng.choice(added)] = rng.choice(WEIRD)
    elif choice < 0.5 and type(old) in (int, float):
        inner[place] = rng.choice((old + 1, old * 2, -old, old * 1000, old * 10**6, old * 10**9, float(old), str(old)))
    else:
        inner[place] = rng.choice(WEIRD)


def _duplicate(data: bytes, rng: random.Random) -> bytes:
    """The first key of the header a second time."""
    length = int.from_bytes(data[:8], "little")
    text = data[8:8 + length].rstrip()
    if not text.endswith(b"}"):
        return _flip(data, rng)
    key = rng.choice((b'"__metadata__":{}', b'"a":1,"a":1', b'"x":{"dtype":"U8","dtype":"U8"}', b'"x":NaN',
                      b'"x":' + b"[" * 10**5))
    text = text[:-1] + b"," + key + b"}"
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length:]


_BYTES: tuple[Mutation, ...] = (_flip, _flip, _cut, _extend, _splice, _length, _noise)
_HEADERS: tuple[Mutation, ...] = (
    *map(_of_header, (_entry_field, _entry_number, _swap_entries, _rename, _drop_or_add, _metadata, _config, _config,
                      _config, _config)), _duplicate)


# ---------------------------------------------------------------------------------------------------------------- check
class Hang(BaseException):
    """No Exception: what a loader wraps must not swallow it."""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"took more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def check(load: Load, seed_file: Path, count: int, seed: int = 0) -> Counter[str]:
    """Mutate `seed_file` `count` times, from `seed` on; a failure names the seeds that repeat it."""
    good, found, failures = seed_file.read_bytes(), Counter[str](), []
    path = seed_file.with_name(f"damaged-{seed_file.name}")
    _check_model(load(seed_file))
    for number in range(seed, seed + count):
        path.write_bytes(mutate(good, random.Random(number)))
        before = _peak()
        try:
            found[_outcome(load, path)] += 1
            assert _peak() - before < GROWTH, f"took {(_peak() - before) >> 20} MiB"
        except (Exception, Hang) as error:
            failures.append(f"seed {number}: {type(error).__name__}: {error}"[:2000])
            if len(failures) == _FAILURES:
                break
    path.unlink()
    if failures:
        raise AssertionError("\n".join(failures))
    return found


def _outcome(load: Load, path: Path) -> str:
    try:
        with _limited():
            model = load(path)
    except nq.NunchakuError as error:
        text = str(error)
        assert path.name in text and len(text) <= LONGEST and "\n" not in text, f"no sentence that names it: {text!r}"
        return "refused"
    _check_model(model)
    return "loaded"


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _check_model(model: Any) -> None:
    assert isinstance(model, nn.Module), f"loaded a {type(model).__name__}"
    for site in quantized_sites(model):
        for name, tensor in site.state_dict().items():
            assert not tensor.is_meta, f"{name} was not loaded"
            if tensor.is_floating_point():
                assert torch.isfinite(tensor.float()).all(), f"{name} is not finite"


LOAD: Load = nq.load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10000, help="of mutated files, of each seed file")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--only", choices=SEEDS, help="one seed file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries(verbose=False)
    for name, write in SEEDS.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                file = write(Path(folder))
                start = time.monotonic()
                found = check(LOAD, file, args.count, args.seed)
                seconds = time.monotonic() - start
            print(f"{name}: {args.count} files, {dict(found)}, {args.count / seconds:.0f} a second, peak memory "
                  f"{_peak() >> 20} MiB", flush=True)


if __name__ == "__main__":
    main()
