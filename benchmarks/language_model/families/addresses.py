# SPDX-License-Identifier: Apache-2.0
"""Web addresses and their parts (urllib)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache, partial
from urllib.parse import SplitResult, parse_qsl, urlsplit

from ..tasks import Operation, Pair
from ..wordings import wording_of
from ..words import listed


PACKAGES = ("urllib",)
SELF_CONTAINED = ("web addresses",)
_SITES = listed(
    "garden music books travel kitchen sports news weather photo school market garage museum health bikes coffee"
)
_FRONTS = listed("www shop blog my app m mail forum docs help")
_ENDINGS = listed("com org net info de fr es it nl co io eu")
_STEPS = listed("news shop user blog en help products items archive team events guides")
_PAGES = listed("about list cart login contact prices search summer winter offers map jobs profile index recent today")
_KEYS = {
    "id": [str(n) for n in range(2, 100)], "page": [str(n) for n in range(2, 30)], "lang": listed("en fr de es it"),
    "sort": listed("price name date size"), "colour": listed("red blue green black white"),
    "year": ["2019", "2021", "2024"], "q": listed("shoes lamp tea bread train paint rose"),
    "user": listed("anna ben carla tom lena"),
}  # fmt: skip


@cache
def addresses() -> tuple[str, ...]:
    draw = random.Random("web addresses")

    def address() -> str:
        scheme = draw.choice(("http", "https", "https", "ftp"))
        host = f"{draw.choice(_FRONTS)}.{draw.choice(_SITES)}.{draw.choice(_ENDINGS)}"
        key = draw.choice(sorted(_KEYS))
        return f"{scheme}://{host}/{draw.choice(_STEPS)}/{draw.choice(_PAGES)}?{key}={draw.choice(_KEYS[key])}"

    return tuple(dict.fromkeys(address() for _ in range(620)))


_PARTS: dict[str, tuple[str, Callable[[SplitResult], str]]] = {
    "host": ("code", lambda url: url.netloc),
    "path": ("code", lambda url: url.path),
    "page": ("word", lambda url: url.path.rpartition("/")[2]),
    "parameter": ("code", lambda url: parse_qsl(url.query)[0][1]),
    "key": ("word", lambda url: parse_qsl(url.query)[0][0]),
    "ending": ("code", lambda url: url.netloc.rpartition(".")[2]),
    "scheme": ("code", lambda url: url.scheme),
    "without_query": ("code", lambda url: url._replace(query="").geturl()),
}


def _pairs(part: Callable[[SplitResult], str]) -> list[Pair]:
    return [(address, part(urlsplit(address))) for address in addresses()]


def operations() -> Iterable[Operation]:
    for name, (answer, part) in _PARTS.items():
        wording = wording_of("addresses", name)
        yield Operation(f"url_{name}", "web addresses", answer, wording, partial(_pairs, part))
