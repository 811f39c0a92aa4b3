# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd serve`: adapters over HTTP."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bases import load_base
from .console import CommandError, Device, Quiet, existing_file, named_places, progress, suggestion
from .prompt_files import files_of_tasks, read_rows, texts_of


if TYPE_CHECKING:
    from peft_dnd.serving import AdapterService, Tokens

_TOKENS_VARIABLE = "PEFT_DND_TOKENS"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "portalocker")
_GIGABYTE = 10**9
_THIS_MACHINE = ("localhost", "127.0.0.1", "[::1]", "::1")
# Beyond so many connections, uvicorn itself answers 503; a proxy holds some open that ask for nothing.
_FEWEST_CONNECTIONS = 512


def serve(
    generator: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PLACE",
            help="A generator: its name in requests, and its folder or Hub id, ID@REVISION for one version. May be "
            "repeated; the first is taken where a request names none.",
        ),
    ],
    cache: Annotated[Path, typer.Option(metavar="FOLDER", help="Where adapters are kept; nothing else is written.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is any that is free.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of bearer tokens, one TOKEN or OWNER:TOKEN a line. Without it they are taken from the "
            f"environment's {_TOKENS_VARIABLE}, with blanks between them.",
        ),
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Allow an address that others can reach without tokens.")
    ] = False,
    tasks: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Tasks by name: a folder with a file of prompts for each, as for generate."
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="Field or column of their prompts.")] = "prompt",
    answer_column: Annotated[
        str, typer.Option(help="And of their answers, for a generator that reads them.")
    ] = "answer",
    remember_prompts: Annotated[
        bool,
        typer.Option(
            "--remember-prompts",
            help="Write the prompts of tasks that clients name into the cache folder, to make their adapters again.",
        ),
    ] = False,
    device: Device = None,
    gate_base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PLACE",
            help="Folder or Hub id of the base on which the behaviour gate of a generator's policy is checked, of the "
            "one called NAME or of all; may be repeated.",
        ),
    ] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Serve adapters of a generator with a behaviour gate unchecked.")
    ] = False,
    max_request_bytes: Annotated[int, typer.Option(min=1, help="Largest body of a request.")] = 1 << 20,
    max_prompts: Annotated[int, typer.Option(min=1, help="Most prompts of a task.")] = 1024,
    max_prompt_characters: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 20_000,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests that are worked on at once.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Adapters that wait for the device at once.")] = 32,
    max_queue_per_client: Annotated[
        int | None, typer.Option(min=1, help="How many of them one client may have; half by default.")
    ] = None,
    max_queue_seconds: Annotated[
        float, typer.Option(min=0.1, help="How long one may wait there; who would wait longer gets 429 at once.")
    ] = 30.0,
    max_cache_gb: Annotated[float, typer.Option(min=1e-6, help="Size of all adapters kept, in GB.")] = 10.0,
    max_cache_adapters: Annotated[int, typer.Option(min=1, help="How many adapters are kept.")] = 1000,
    max_cache_hours: Annotated[float, typer.Option(min=1e-6, help="How long one is kept.")] = 168.0,
    max_tasks: Annotated[int, typer.Option(min=1, help="How many tasks may have a name.")] = 1000,
    grace_seconds: Annotated[
        int, typer.Option(min=0, help="When stopped: how long requests that are being worked on may take.")
    ] = 30,
    quiet: Quiet = False,
) -> None:
    """Serve adapters over HTTP: prompts in, an id out, the adapter under that id.

    What is asked for again is not made again, also by several such processes with one cache folder. /openapi.json
    describes the service, /health/ready says whether it is up, /metrics is for Prometheus. Logs are JSON on standard
    error, without any prompt. A TERM signal stops it once what is being worked on is done.

    Example:
      python -c "import secrets; print('me:' + secrets.token_urlsafe(32))" > tokens.txt
      peft-dnd serve --generator demo=org/generator --cache adapters --token-file tokens.txt --host 0.0.0.0
      peft-dnd serve --generator a=folder --generator b=org/generator@v2 --cache adapters --tasks prompts-of-tasks
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise CommandError(f"To serve, install what it needs ({', '.join(missing)}): pip install 'peft-dnd[serve]'")
    places = _places(generator)
    bases = _gate_bases(gate_base or [], list(places))
    rows = _rows_of_tasks(tasks, column)
    if token_file is not None:
        existing_file(token_file, "The file of tokens")
    bound = _bound(host, port)
    with bound:
        _log_as_json(quiet)
        tokens = _tokens(token_file, host, bound, open_to_all)
        limits: dict[str, Any] = {
            "request_bytes": max_request_bytes,
            "prompts": max_prompts,
            "prompt_characters": max_prompt_characters,
            "requests": max_requests,
            "queue": max_queue,
            "queue_per_client": max_queue_per_client,
            "queue_seconds": max_queue_seconds,
            "cache_bytes": round(max_cache_gb * _GIGABYTE),
            "cache_adapters": max_cache_adapters,
            "cache_seconds": max_cache_hours * 3600,
            "tasks": max_tasks,
        }
        with progress(quiet):
            service = _service(places, cache, limits, rows, answer_column, device, remember_prompts=remember_prompts)
            _set_gates(service, bases, device, unchecked=no_gate)
        _run(service, tokens, None if tokens or open_to_all else (*_THIS_MACHINE, host), bound, grace_seconds)


def _places(generators: list[str]) -> dict[str, tuple[str, str | None]]:
    """Name of each generator -> its folder or Hub id, and its revision."""
    found: dict[str, tuple[str, str | None]] = {}
    for name, place in named_places(generators, "--generator", "NAME=PLACE").items():
        revision = None
        if not Path(place).exists() and "@" in place:
            place, _, revision = place.rpartition("@")
        found[name] = (place, revision)
    return found


def _gate_bases(given: list[str], names: list[str]) -> dict[str, str]:
    """Name of a generator -> folder or Hub id of the base that its behaviour gate is checked on.

    One that is named goes before that of all, whichever comes first.
    """
    named = named_places([one for one in given if "=" in one], "--gate-base", "NAME=PLACE")
    of_all = [one for one in given if "=" not in one]
    for name in named:
        if name not in names:
            raise typer.BadParameter(
                f"--gate-base {name}={named[name]}: there is no generator {name!r}.{suggestion(name, names)}"
            )
    if len(of_all) > 1:
        raise typer.BadParameter(f"--gate-base is {of_all[0]!r} and {of_all[1]!r} for all generators: name them.")
    return {**{name: of_all[0] for name in names if of_all}, **named}


def _set_gates(service: AdapterService, bases: dict[str, str], device: str | None, *, unchecked: bool) -> None:
    """Load the bases of generators with a behaviour gate, each once.

    Raises:
        CommandError: If there is none for such a generator, or a policy wants what the command does not have.
    """
    loaded: dict[str, Any] = {}
    try:
        for name, served in service.generators.items():
            policy = served.generator.policy
            if policy is None:
                continue
            if policy.classifier is not None:
                raise CommandError(
                    f"The policy of the generator {name!r} wants prompts to be classified by {policy.classifier!r}, "
                    "which is a function of Python. Serve it from Python, with create_app."
                )
            if policy.gate is None:
                continue
            if served.generator.config.bases:
                if unchecked:
                    continue
                raise CommandError(
                    f"The generator {name!r} has several bases, and a behaviour gate is checked on one. Serve that "
                    "one alone, as generator.for_base(...).save_pretrained(folder) writes it; or unchecked, with "
                    "--no-gate."
                )
            if name in bases:
                place = bases[name]
                task_type = served.generator.config.adapter_layout.task_type
                loaded[place] = loaded.get(place) or load_base(place, task_type, device)
                served.generator.set_gate_base(loaded[place])
            elif not unchecked:
                raise CommandError(
                    f"The policy of the generator {name!r} has a behaviour gate: adapters are checked on the base. "
                    f"Give it: --gate-base {name}=PLACE; or serve them unchecked, with --no-gate."
                )
    except BaseException:
        service.close()
        raise


def _rows_of_tasks(folder: Path | None, column: str) -> dict[str, list[dict[str, Any]]]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise CommandError(f"The folder of tasks {str(folder)!r} is none. Give a folder with a file for each task.")
    return {task: read_rows(str(path), column) for task, path in files_of_tasks(folder).items()}


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before anything is loaded, so that a wrong one is told at once."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        if os.name != "nt":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise CommandError(
            f"Cannot listen on {host!r}, port {port} ({error.strerror or error}). Give another --host or --port."
        ) from error
    return bound


def _log_as_json(quiet: bool) -> None:
    from transformers.utils import logging as transformers_logging

    from peft_dnd.serving import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()


def _tokens(path: Path | None, host: str, bound: socket.socket, open_to_all: bool) -> Tokens:
    from peft_dnd.serving import Tokens

    if path is not None:
        if os.name != "nt" and path.stat().st_mode & 0o077:
            logging.getLogger("peft_dnd.serving").warning(
                "others on this machine can read the file of tokens: chmod 600 it"
            )
        tokens = Tokens.from_file(path)
    else:
        # Out of the environment, so that no process that this one starts has them.
        tokens = Tokens(os.environ.pop(_TOKENS_VARIABLE, "").split())
    if not tokens and not open_to_all and not ip_address(bound.getsockname()[0]).is_loopback:
        raise CommandError(
            f"Others can reach {host!r}, and there are no tokens. Give --token-file, set {_TOKENS_VARIABLE}, listen "
            "on 127.0.0.1, or say --open-to-all."
        )
    return tokens


def _service(
    places: dict[str, tuple[str, str | None]],
    cache: Path,
    limits: dict[str, Any],
    rows: dict[str, list[dict[str, Any]]],
    answer_column: str,
    device: str | None,
    *,
    remember_prompts: bool,
) -> AdapterService:
    import torch

    from peft_dnd.serving import AdapterCache, AdapterService, ServiceLimits, load_served_generator

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bounds = ServiceLimits(**limits)
    kept = AdapterCache(cache, bounds)
    try:
        loaded = [
            load_served_generator(name, place, revision=revision, device=where)
            for name, (place, revision) in places.items()
        ]
        reads_answers = loaded[0].generator.config.condition_text != "prompts"
        tasks = {name: _task_prompts(name, of, answer_column if reads_answers else None) for name, of in rows.items()}
        return AdapterService(loaded, kept, bounds, tasks=tasks, remember_prompts=remember_prompts)
    except BaseException:
        kept.close()
        raise


def _task_prompts(name: str, rows: list[dict[str, Any]], answer_column: str | None) -> Any:
    from peft_dnd.serving import TaskPrompts

    column = next(iter(rows[0]))
    answers = None if answer_column is None else tuple(texts_of(rows, answer_column, name))
    return TaskPrompts(tuple(texts_of(rows, column, name)), answers)


def _run(
    service: AdapterService, tokens: Tokens, hosts: tuple[str, ...] | None, bound: socket.socket, grace_seconds: int
) -> None:
    import uvicorn

    from peft_dnd.serving import create_app
    from peft_dnd.serving.http_protocol import PatientProtocol

    config = uvicorn.Config(
        create_app(service, tokens, hosts=hosts),
        lifespan="on",
        log_config=None,  # ours is set up already
        access_log=False,  # it would hold paths and queries as clients wrote them
        server_header=False,
        proxy_headers=False,
        http=PatientProtocol,
        ws="none",
        limit_concurrency=max(_FEWEST_CONNECTIONS, 4 * service.limits.requests),
        timeout_graceful_shutdown=grace_seconds,
    )
    # Once it has stopped, uvicorn sends itself the signal again: having stopped as asked is no failure.
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: None)
    server = uvicorn.Server(config)
    server.run(sockets=[bound])
    if not server.started:
        raise CommandError("The service could not start; the log says why.")
