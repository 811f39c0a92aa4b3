# SPDX-License-Identifier: Apache-2.0
"""Shows the world: how many tasks of what kind, and samples of them to read.

python benchmarks/language_model/show_world.py --count 20 --unseen
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path


# Run as a script, the package's own folder is on the path and not the one that it lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from language_model.world import World, build_world


def show_counts(world: World) -> None:
    kinds = Counter(task.kind for task in world.tasks.values())
    families = Counter(task.family for task in world.tasks.values())
    print(f"{len(world.tasks)} tasks, {len({task.operation.name for task in world.tasks.values()})} operations")
    print("\n".join(f"{count:6} {kind}" for kind, count in kinds.most_common()))
    print("\n".join(f"{count:6} {family}" for family, count in families.most_common()))
    print("held out:", ", ".join((*world.split.held_families, *world.split.held_languages)))
    print("held out:", ", ".join(world.split.held_operations))


def show_samples(world: World, count: int, wordings: str, seed: int) -> None:
    draw = random.Random(seed)
    for name in draw.sample(sorted(world.tasks), min(count, len(world.tasks))):
        task = world[name]
        example = draw.choice(task.test)
        print(f"\n{name} ({task.kind})\n  {draw.choice(task.instructions(wordings))}")
        print(f"  {example.input} -> {example.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--data", action="append", default=[], help="a folder of further tasks; may be given again")
    parser.add_argument("--count", type=int, default=10, help="samples to show")
    parser.add_argument("--unseen", action="store_true", help="in wordings never used for fitting")
    parser.add_argument("--draw", type=int, default=0, help="another number shows other samples")
    arguments = parser.parse_args()
    world = build_world(arguments.seed, arguments.data)
    show_counts(world)
    show_samples(world, arguments.count, "unseen" if arguments.unseen else "seen", arguments.draw)


if __name__ == "__main__":
    main()
