"""Seeded damage to bytes and to what JSON holds."""

import copy
import json
import random
from typing import Any

DEEP = "\x00deep\x00"  # stands for lists in lists, deeper than Python's parser goes
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    0.5,
    1e300,
    -1e300,
    10**18,
    2**31,
    8 * 10**8,
    float("nan"),
    float("inf"),
    "",
    "x",
]
ODD += ["../x", "1", "forward", [], {}, [5], [[1, 2]], ["x"], {"a": 1}, "x" * 10_000, [0] * 5000, DEEP]


def odd(rng: random.Random) -> Any:
    """A value that fits few places."""
    return copy.deepcopy(rng.choice(ODD))


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, cut off, doubled, blanked, or large numbers written over them."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        # Half of the damage near the beginning, where headers lie.
        place = rng.randrange(max(1, min(len(out), 400) if rng.random() < 0.5 else len(out)))
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[min(place, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[place:]
        elif kind == 2:
            out[place:place] = out[place : place + rng.randrange(1, 64)]
        elif kind == 3:
            out[place : place + 16] = bytes(16)
        elif kind == 4:
            out[place : place + 8] = b"\xff" * 7 + b"\x7f"
        else:
            out[place : place + 4] = rng.randbytes(4)
    return bytes(out)


def damaged_value(rng: random.Random, value: Any, times: int = 0) -> Any:
    """A copy of what JSON held, with odd values in some places, and names that are gone or new."""
    out = copy.deepcopy(value)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        holder, key = _place(rng, out)
        if holder is None:
            return odd(rng)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(["x", "", "forward", "9" * 30])] = odd(rng)
        elif kind == 2 and type(holder[key]) in (int, float):
            holder[key] = holder[key] * rng.choice((-1, 2, 10**6, 10**9, 0.5)) + rng.choice((0, 1))
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[key] = odd(rng)
    return out


def _place(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A list or mapping somewhere in a value, and one of its places."""
    holder: Any = None
    key: Any = None
    while isinstance(value, (list, dict)) and value and (holder is None or rng.random() < 0.85):
        holder, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = holder[key]
    return holder, key


def as_json(value: Any) -> str:
    """Its text; NaN and infinity as Python writes them, :data:`DEEP` as 1000 lists in each other."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 1000 + "]" * 1000)


def damaged_json(rng: random.Random, text: str) -> str:
    """JSON with odd values in it, or damaged as text."""
    if rng.random() < 0.2 or text[:1] not in ("{", "["):
        return damaged_bytes(rng, text.encode()).decode("latin-1")
    return as_json(damaged_value(rng, json.loads(text)))


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Damaged bytes, header, or JSON in the metadata."""
    if rng.random() < 0.3:
        return damaged_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    told = header.get("__metadata__", {})
    if told and rng.random() < 0.6:
        name = rng.choice(list(told))
        told[name] = damaged_json(rng, told[name])
    else:
        header = damaged_value(rng, header)
    text = as_json(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
