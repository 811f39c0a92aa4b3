# SPDX-License-Identifier: Apache-2.0
"""What the page says: of itself, of a generator, of an adapter that was made."""

from __future__ import annotations

from pathlib import PurePath

from ..adapters.generated_adapter import GeneratedAdapter
from .page_generator import MadeAdapter, PageGenerator


HEAD = """# Prompts to adapter

Drop a few unlabelled prompts of a task. A generator reads them and writes a LoRA adapter in one forward pass, without
training. Try it beside its base, and take it away: it is an ordinary PEFT adapter."""


def title_of(by: PageGenerator) -> str:
    """A generator in one line, in Markdown."""
    config = by.generator.config
    layout, base = config.adapter_layout, config.base_model_name_or_path or "a base that it does not name"
    known = "" if by.map is None else f", fitted on {len(by.map.tasks)} tasks"
    missing = "" if by.base is not None else " **Its base is not here: adapters can be made and taken, not tried.**"
    return (
        f"Writes adapters for `{short_name(base)}`: {layout.in_words()}, "
        f"{layout.num_parameters:,} parameters{known}.{missing}"
    )


def short_name(name: str) -> str:
    """A Hub id as it stands; of a folder of this machine its last two parts, as the rest is nothing to visitors.

    >>> short_name("org/generator"), short_name("runs/demo_output/seed-0/generator")
    ('org/generator', 'seed-0/generator')
    """
    return "/".join(PurePath(name).parts[-2:])


def facts_of(made: MadeAdapter, by: PageGenerator) -> str:
    """An adapter that was made, as a table in Markdown."""
    provenance = made.adapter.provenance
    rows = [
        ("made in", f"{made.seconds:.2f} s, from {made.prompts} prompts"),
        ("size", f"{size_in_words(made.bytes)}, {made.adapter.num_parameters:,} parameters"),
        ("out of distribution", _score_in_words(made.adapter)),
        ("nearest", _nearest_in_words(made, by)),
        ("prompts' SHA-256", f"`{str(provenance['prompts_sha256'])[:16]}…`, seed {provenance['seed']}"),
    ]
    first, *others = [f"| {what} | {said} |" for what, said in rows if said]
    return "\n".join([first, "| --- | --- |", *others])


def map_caption(by: PageGenerator) -> str:
    """What the picture shows, and how far to trust it."""
    if by.map is None:
        return ""
    return (
        f"Where the prompts of {len(by.map.tasks)} fitted tasks lie, and yours. The plane shows "
        f"{by.map.kept:.0%} of what tasks differ in; the score counts all of it."
    )


def size_in_words(size: int) -> str:
    """A number of bytes for people.

    >>> size_in_words(900), size_in_words(52_000), size_in_words(4_100_000)
    ('900 B', '52.0 kB', '4.1 MB')
    """
    for unit, of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= of:
            return f"{size / of:.1f} {unit}"
    return f"{size} B"


def _score_in_words(adapter: GeneratedAdapter) -> str:
    score, threshold = adapter.out_of_distribution, adapter.provenance.get("out_of_distribution_threshold")
    if score is None or threshold is None:
        return "unknown: the generator keeps nothing of the tasks that it was fitted on"
    if score > threshold:
        return f"**{score:.3f}**: unlike the fitted tasks (above {threshold:.3g}). Expect little of the adapter."
    return f"{score:.3f}: like a new task of the fitted tasks' kind (up to {threshold:.3g})"


def _nearest_in_words(made: MadeAdapter, by: PageGenerator) -> str:
    if by.map is None:
        return ""
    of_one, tasks = by.map.nearest(made.points)
    count = len(made.points)
    others = f"; {tasks - 1} other(s) to the rest" if tasks > 1 else ""
    return f"one fitted task to {of_one} of {count} prompts{others}"
