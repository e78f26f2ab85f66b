"""Row C5 of the fault matrix: whatever is wrong with the newest checkpoint, it is named, and the one before is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from matrix import counted
from ranks_apart import on_ranks, succeeded
from tiny_state import TEXTS, holds, state_after, store_in

from bigtrain.checkpoint.manifest import MANIFEST, folder_name
from bigtrain.world import World

OLD, NEW = 3, 4
SHARDS = 2


def saved(folder: Path) -> None:
    """Save two steps on two ranks, so that there are shards."""
    for steps in (OLD, NEW):
        succeeded(on_ranks(SHARDS, lambda world: save_on(world, folder, steps)))  # noqa: B023 - called at once


def save_on(world: World, folder: Path, steps: int) -> None:
    state_after(steps, world).save(store_in(folder, world=world), TEXTS)


def some_file(folder: Path, luck: random.Random) -> Path:
    return luck.choice(sorted(folder.iterdir()))


def flip(new: Path, old: Path, luck: random.Random) -> str:
    path = some_file(new, luck)
    raw = bytearray(path.read_bytes())
    place, bit = luck.randrange(len(raw)), luck.randrange(8)
    raw[place] ^= 1 << bit
    path.write_bytes(raw)
    return f"{path.name}, bit {bit} of byte {place}"


def zero(new: Path, old: Path, luck: random.Random) -> str:
    path = some_file(new, luck)
    raw = bytearray(path.read_bytes())
    start = luck.choice([place for place, byte in enumerate(raw) if byte])
    length = luck.choice((1, 8, 512, 4096))
    raw[start : start + length] = bytes(len(raw[start : start + length]))
    path.write_bytes(raw)
    return f"{path.name}, {length} bytes at {start}"


def truncate(new: Path, old: Path, luck: random.Random) -> str:
    path = some_file(new, luck)
    raw = path.read_bytes()
    kept = luck.randrange(len(raw))
    path.write_bytes(raw[:kept])
    return f"{path.name} to {kept}"


def append(new: Path, old: Path, luck: random.Random) -> str:
    path = some_file(new, luck)
    path.write_bytes(path.read_bytes() + bytes(luck.choice((1, 8, 4096))))
    return path.name


def delete(new: Path, old: Path, luck: random.Random) -> str:
    path = some_file(new, luck)
    path.unlink()
    return path.name


def swap_shards(new: Path, old: Path, luck: random.Random) -> str:
    kind = luck.choice(("weights", "optimizer"))
    one, other = sorted(new.glob(f"{kind}-*"))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    return kind


def mix_steps(new: Path, old: Path, luck: random.Random) -> str:
    """Replace some files by those of the step before, as two saves into one folder would."""
    names = sorted(path.name for path in old.iterdir() if path.read_bytes() != (new / path.name).read_bytes())
    mixed = luck.sample([name for name in names if name != MANIFEST], luck.randint(1, 2))
    for name in mixed:
        shutil.copyfile(old / name, new / name)
    return ", ".join(mixed)


def stale_manifest(new: Path, old: Path, luck: random.Random) -> str:
    shutil.copyfile(old / MANIFEST, new / MANIFEST)
    return "the manifest of the step before"


def stale_folder(new: Path, old: Path, luck: random.Random) -> str:
    """Put the whole step before under the newer name: each file fits its manifest, and the step does not."""
    shutil.rmtree(new)
    shutil.copytree(old, new)
    return "the folder of the step before"


def link(new: Path, old: Path, luck: random.Random) -> str:
    path = some_file(new, luck)
    outside = new.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    return path.name


KINDS: dict[Callable[[Path, Path, random.Random], str], int] = {
    flip: 34, zero: 16, truncate: 16, append: 4, delete: 6, swap_shards: 6, mix_steps: 10, stale_manifest: 3,
    stale_folder: 2, link: 3,
}  # fmt: skip
"""Of a hundred cases."""


def corrupt(tier: str, cases: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(folder / "good")
    luck, before = random.Random(5), state_after(OLD)
    kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
    with counted("C5", tier) as counts:
        for number in range(cases):
            kind, work = kinds[number % len(kinds)], folder / "run"
            shutil.copytree(folder / "good", work)
            what = kind(work / folder_name(NEW), work / folder_name(OLD), luck)
            found = store_in(work).newest()
            named = f"passed over: {work / folder_name(NEW)}" in capsys.readouterr().err
            fell_back = found == work / folder_name(OLD) and (number % 10 or holds(found, before))
            counts.add(named and fell_back, f"{kind.__name__}: {what}: found {found}, named={named}")
            shutil.rmtree(work)


@pytest.mark.slow
def test_c5_corruption(quick_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrupt("ci", 1_000, quick_path, capsys)


@pytest.mark.nightly
def test_c5_much_corruption(quick_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrupt("nightly", 10_000, quick_path, capsys)
