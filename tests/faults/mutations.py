"""Ways to damage a file or a folder, each a function of a random generator alone."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path


_NUMBERS = ("-1", "0", "1", "2147483648", "99999999999999999999999", "1e308", "-1e-300", "NaN", "Infinity", "0.5")
_VALUES = (
    None,
    True,
    -1,
    0,
    3,
    10**6,
    10**12,
    10**23,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x00",
    "a\nb",
    "../x",
)
_WRONG_TYPES = ([], {}, [[]], [1], ["x"], {"x": 1}, {"": None})


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to three changes: flipped bits, bytes cut off, put in, left out or repeated, a number made huge."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_BYTE_CHANGES)(content, rng)
    return content


def mutate_folder(folder: Path, rng: random.Random) -> None:
    """Damage one or two files of a folder, or take them away, swap or replace them."""
    for _ in range(rng.choice((1, 1, 2))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return
        file = rng.choice(files)
        if rng.random() < 0.75:
            mutate_file(file, rng)
        else:
            rng.choice(_FILE_CHANGES)(file, rng.choice(files), rng)


def mutate_file(file: Path, rng: random.Random) -> None:
    """Damage one file: its bytes, or where it is JSON or safetensors, what it says."""
    content = file.read_bytes()
    if rng.random() < 0.6:
        if file.suffix == ".json":
            content = mutate_json(content, rng)
        elif file.suffix == ".safetensors":
            content = _mutate_header(content, rng)
        else:
            content = mutate_bytes(content, rng)
    else:
        content = mutate_bytes(content, rng)
    file.write_bytes(content)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, rename, remove, repeat or reorder one value at any depth, or nest it beyond reason."""
    try:
        tree = json.loads(content)
    except ValueError:
        return mutate_bytes(content, rng)
    places = list(_places(tree))
    if not places:
        return json.dumps(rng.choice(_VALUES)).encode()
    box, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind <= 2:
        box[key] = rng.choice(_VALUES)
    elif kind == 3:
        box[key] = rng.choice(_WRONG_TYPES)
    elif kind == 4:
        del box[key]
    elif kind == 5 and isinstance(box, dict):
        box[rng.choice(("x", "", str(key) + "_", "0"))] = box.pop(key)
    elif kind == 6:
        other, name = rng.choice(places)
        other[name], box[key] = box[key], other[name]
        try:
            json.dumps(tree)
        except ValueError:  # a value was put into itself
            return mutate_bytes(content, rng)
    else:
        return json.dumps(tree).encode().replace(b"}", b"}" + b"[" * rng.choice((1, 3, 50_000)), 1)
    return json.dumps(tree).encode()


def _places(tree):
    if not isinstance(tree, dict | list):
        return
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        yield from _places(value)


def _mutate_header(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= len(content) - 8:
        return mutate_bytes(content, rng)
    header = mutate_json(content[8 : 8 + length], rng)
    stated = len(header) if rng.random() < 0.9 else rng.choice((0, 7, 2**31, 2**63, len(header) + 1))
    return stated.to_bytes(8, "little") + header + content[8 + length :]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_near_the_start(content: bytes, rng: random.Random) -> bytes:
    return _flip(content[:200], rng) + content[200:]


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))] if content else content


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice((rng.randbytes(rng.randrange(1, 9)), b"\x00" * 64, b"\xff" * 4)) + content[at:]


def _leave_out(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.choice((1, 4, 100)) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(content) + 1), rng.choice((1, 20, 1000))
    return content[: at + length] + content[at:]


def _empty(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"", b"\x00", b" ", b"\n"))


def _other_number(content: bytes, rng: random.Random) -> bytes:
    numbers = list(re.finditer(rb"\d+", content[:100_000]))
    if not numbers:
        return _flip(content, rng)
    found = rng.choice(numbers)
    return content[: found.start()] + rng.choice(_NUMBERS).encode() + content[found.end() :]


_BYTE_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip_near_the_start, _truncate, _insert, _leave_out, _repeat, _empty, _other_number, _other_number),
)


def _remove(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()


def _rename(file: Path, other: Path, rng: random.Random) -> None:
    file.rename(file.with_name(rng.choice((f"x{file.name}", f"{file.name}.bak", "model.safetensors", "config.json"))))


def _swap(file: Path, other: Path, rng: random.Random) -> None:
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def _copy_over(file: Path, other: Path, rng: random.Random) -> None:
    if file != other:
        shutil.copy(other, file)


def _as_folder(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _as_pipe(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def _as_link_to_itself(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.name)


_FILE_CHANGES = (_remove, _rename, _swap, _copy_over, _as_folder, _as_pipe, _as_link_to_itself)
