"""Random damage to the files of a checkpoint, one byte or one cut at a time."""

import random
from collections.abc import Iterator
from pathlib import Path


def damages(root: Path, seed: int, tries: int) -> Iterator[tuple[str, Path]]:
    """Each file in turn, three flips for one cut; it is whole again afterwards."""
    chance = random.Random(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for number in range(tries):
        path = files[number % len(files)]
        original = path.read_bytes()
        damaged = bytearray(original)
        place = chance.randrange(len(damaged))
        if number % 4:
            damaged[place] ^= chance.randrange(1, 256)
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        yield f"{path.name}: {'flip' if number % 4 else 'cut'} at {place}", path
        path.write_bytes(original)
