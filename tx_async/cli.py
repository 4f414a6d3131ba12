"""`tx-async`: one command per thing that an operator does. Each imports only its own side, so `--help` is instant and
the server never sees JAX.

An error that the operator can fix (`ConfigError`, an occupied port) is one line on stderr and exit code 2; a traceback
is a bug.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tx_async import __version__, cli_backup, cli_chat, cli_checkpoints, cli_keys, cli_runs, compatibility, config
from tx_async.cli_numbers import at_least_one
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError
from tx_async.field_docs import field_docs

if TYPE_CHECKING:
    from tx_async.worker.external_settings import ExternalSettings
    from tx_async.worker.ranks import Rank

EXIT_OPERATOR = 2
_CONFIG_FLAGS = tuple(
    "--" + name.replace("_", "-") for name in (*ServerConfig.__struct_fields__, *compatibility.SERVER)
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ConfigError as error:
        print(f"tx-async: {error.message}", file=sys.stderr)
        return EXIT_OPERATOR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`): point stdout elsewhere, or its flush at exit fails too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tx-async", description="A self-hosted server for the Tinker API.")
    top.add_argument("--version", action="version", version=f"tx-async {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_worker(commands)
    _add_demo(commands)
    _add_migrate(commands)
    cli_checkpoints.add_import(commands, _add_config_flags, _load_config)
    cli_checkpoints.add_checkpoints(commands)
    cli_backup.add(commands, _add_config_flags, _load_config)
    cli_keys.add(commands)
    cli_runs.add(commands)
    cli_chat.add(commands)
    _add_doctor(commands)
    _add_deploy(commands)
    _add_schemas(commands)
    return top


def command_docs() -> list[tuple[str, str, str]]:
    """(command, what it does, its own flags) for every command: the table in schemas/commands.md and its test use
    it."""
    docs = []
    for name, command, summary in _commands_of(parser()):
        options = [flag for action in command._actions for flag in action.option_strings if flag.startswith("--")]
        takes_settings = set(_CONFIG_FLAGS) <= set(options)
        hidden = {"--help", *((*_CONFIG_FLAGS, "--no-dashboard") if takes_settings else ())}
        own = [f"`{flag}`" for flag in options if flag not in hidden] + ["every setting"] * takes_settings
        docs.append((f"`tx-async {name}`", summary, ", ".join(own)))
    return docs


def _commands_of(top: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser, str]]:
    """Every command and every action of a command, with its full name."""
    found = []
    for group in (action for action in top._actions if isinstance(action, argparse._SubParsersAction)):
        summaries = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for name, command in group.choices.items():
            found.append((name, command, summaries[name]))
            found += [(f"{name} {action}", *rest) for action, *rest in _commands_of(command)]
    return found


# ---- serve


def _add_serve(commands: Any) -> None:
    command = commands.add_parser(
        "serve",
        help="start the server",
        usage="tx-async serve --base-model DIR_OR_HUB_NAME [settings]",
        description="Start the server and its local workers.",
    )
    _add_config_flags(command)
    command.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from tx_async.serve import serve

    return serve(_load_config(args))


def _add_config_flags(command: argparse.ArgumentParser) -> None:
    """`--config FILE` and one flag per field of `ServerConfig`."""
    command.add_argument("--config", metavar="FILE", help="TOML file with any of the settings below; flags win over it")
    group = command.add_argument_group("settings (also TX_… variables and keys of the file)")
    for field in field_docs(ServerConfig):
        is_json = isinstance(field.default, msgspec.Struct)
        shown = "" if is_json or field.default in ("", False, None) else f" [{field.default}]"
        is_switch = field.type.split(" ")[0] == "bool"
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if is_switch else {}
        flag = field.name.replace("_", "-")
        if field.default is None:
            group.add_argument(f"--no-{flag}", dest=field.name, action="store_const", const="false", help="not that")
        group.add_argument(
            f"--{flag}",
            metavar="JSON" if is_json else "BOOL" if is_switch else field.type.upper(),
            help=(field.doc.replace("%", "%%") + shown).strip(),
            **switch,
        )
    taken = command.add_argument_group("settings of SkyRL tx, which are accepted as well")
    for name, foreign in compatibility.SERVER.items():
        taken.add_argument("--" + name.replace("_", "-"), metavar="STR", help=foreign.doc)


def _load_config(args: argparse.Namespace) -> ServerConfig:
    """The settings of file < environment < flags, as in `config.load`."""
    environ = dict(os.environ)
    if args.config:
        environ["TX_CONFIG"] = args.config
    flags = {field: getattr(args, field) for field in (*ServerConfig.__struct_fields__, *compatibility.SERVER)}
    return config.load(flags, environ)


# ---- worker


def _add_worker(commands: Any) -> None:
    command = commands.add_parser(
        "worker", help="start a worker by hand", description="Attach this host's devices to a server."
    )
    command.add_argument(
        "--connect", metavar="ADDRESS", default="", help="the server's worker_address, tcp:// or ipc://"
    )
    command.add_argument(
        "--coordinator-address", metavar="HOST:PORT", default="",
        help="where the mesh joins; without --connect, the server is on that host, "
        f"at port {compatibility.WORKER_PORT}",
    )  # fmt: skip
    command.add_argument(
        "--num-processes",
        type=int,
        default=0,
        help="processes of its mesh [from Slurm, Kubernetes or MPI, else the server]",
    )
    command.add_argument(
        "--token", default=os.environ.get("TX_WORKER_TOKEN", ""), help="the server's worker_token [TX_WORKER_TOKEN]"
    )
    command.add_argument(
        "--process-id", type=int, help="its place in the mesh, from 0 [from Slurm, Kubernetes or MPI, else 0]"
    )
    command.add_argument(
        "--engine", default="", metavar="MODULE:FACTORY", help="vllm, or an engine of your own [the JAX engine]"
    )
    command.add_argument("--name", default="", help="the worker that this process is a part of [w0]")
    command.add_argument(
        "--capabilities", default="", help="what the engine can do [train,sample,score; for vllm: sample]"
    )
    command.add_argument("--vllm-url", default="", metavar="URL", help="where vLLM listens, http://127.0.0.1:8001")
    command.add_argument("--vllm-lora-dir", default="", metavar="DIR", help="folder for adapters that vLLM also sees")
    command.add_argument("--vllm-api-key-file", default="", metavar="FILE", help="file with vLLM's API key")
    command.add_argument(
        "--vllm-allow-unproven", action="store_true", help="let vLLM sample adapters of mixtures of experts, too"
    )
    command.set_defaults(run=_worker)


def _worker(args: argparse.Namespace) -> int:
    """Run until a signal: whatever ends the worker's process or its mesh, the next process attaches again."""
    import asyncio

    from tx_async.private import private_umask
    from tx_async.worker import external_settings
    from tx_async.worker.main import CAPABILITIES
    from tx_async.worker.supervisor import attach_forever

    _check_engine(args)
    external = _external_engine(args)
    usual = external_settings.CAPABILITIES if external else ",".join(CAPABILITIES)
    capabilities = args.capabilities or usual
    if unknown := sorted(set(capabilities.split(",")) - set(CAPABILITIES)):
        raise ConfigError(f"--capabilities {unknown[0]!r} is unknown; known: {', '.join(CAPABILITIES)}.")
    rank = _rank(args, "train" in capabilities.split(","))
    _check_place(rank.process_id, args.num_processes or rank.num_processes)
    worker = attach_forever(
        _worker_address(args),
        args.token,
        rank.process_id,
        args.engine,
        num_processes=rank.num_processes,
        coordinator_address=rank.coordinator_address,
        name=args.name or (external.name if external else "w0"),
        capabilities=capabilities,
        external=external,
    )
    with private_umask():
        asyncio.run(worker)
    return 0


def _check_engine(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for an engine that no process of this host could import, found without importing it."""
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    from tx_async.worker import external_settings

    if args.engine == external_settings.ENGINE:
        return
    given = [name for name in vars(args) if name.startswith("vllm_") and getattr(args, name)]
    if given:
        raise ConfigError(f"--{given[0].replace('_', '-')} needs --engine {external_settings.ENGINE}.")
    module, _, factory = args.engine.partition(":")
    package = module.partition(".")[0]
    # A worker's process finds modules of the working directory, too.
    is_found = package and (find_spec(package) or PathFinder.find_spec(package, [os.getcwd()]))
    if args.engine and not (factory and is_found):
        raise ConfigError(
            f"--engine {args.engine!r} is unknown: it must be {external_settings.ENGINE}, or module:function of a "
            "module that is installed here."
        )


def _check_place(process_id: int, num_processes: int) -> None:
    """num_processes: 0 = the server knows. Raises `ConfigError`."""
    if num_processes < 0:
        raise ConfigError(f"--num-processes is {num_processes}; it must be at least 1.")
    if process_id < 0 or 0 < num_processes <= process_id:
        below = f" and below --num-processes ({num_processes})" if num_processes else ""
        raise ConfigError(f"--process-id is {process_id}; it must be at least 0{below}.")


def _external_engine(args: argparse.Namespace) -> ExternalSettings | None:
    from tx_async.worker import external_settings

    if args.engine != external_settings.ENGINE:
        return None
    return external_settings.ExternalSettings(
        url=args.vllm_url,
        lora_dir=args.vllm_lora_dir,
        api_key=external_settings.read_key_file(args.vllm_api_key_file, "--vllm-api-key-file"),
        allow_unproven=args.vllm_allow_unproven,
        worker_name=args.name,
    ).check("--vllm-url", "--vllm-lora-dir")


def _rank(args: argparse.Namespace, is_mesh: bool) -> Rank:
    """Flags take precedence over the launcher; a worker that does not train is not part of a mesh."""
    import socket

    from tx_async.worker.ranks import Rank, discover

    found = None
    if args.process_id is None and is_mesh:
        found = discover(os.environ, args.connect, socket.getfqdn)
    if found is None:
        return Rank("flags", args.process_id or 0, args.num_processes if is_mesh else 0, args.coordinator_address)
    print(f"tx-async worker: {found}", file=sys.stderr)
    return Rank(
        found.launcher,
        found.process_id,
        args.num_processes or found.num_processes,
        args.coordinator_address or found.coordinator_address,
    )


def _worker_address(args: argparse.Namespace) -> str:
    if not (args.connect or args.coordinator_address):
        raise ConfigError("worker needs --connect ADDRESS: the server's worker_address.")
    return args.connect or compatibility.connect_of(args.coordinator_address)


# ---- demo


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="train and sample a tiny model on this machine, in a minute",
        description="Start a server in a temporary folder, teach a model three phrases of Pig Latin through the real "
        "SDK, show the answers, clean up. Needs no network, no account and no GPU.",
    )
    command.add_argument(
        "--base-model", default="", metavar="DIR_OR_HUB_NAME", help="train this model [a tiny one, made here]"
    )
    command.add_argument("--serve", action="store_true", help="only serve the model, until Ctrl-C")
    command.add_argument("--port", type=int, default=8000, help="where --serve listens, on loopback [8000]")
    command.add_argument("--steps", type=at_least_one, default=0, help="training steps [40]")
    command.add_argument("--learning-rate", type=float, default=0.0, help="[0.005 for the tiny model, else 0.0005]")
    command.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from tx_async import demo

    if args.serve:
        return demo.serve(args.base_model, args.port)
    return demo.run(args.base_model, args.steps, args.learning_rate)


# ---- migrate


def _add_migrate(commands: Any) -> None:
    command = commands.add_parser(
        "migrate", help="bring the journal's schema up to date", description="`serve` does this by itself at its start."
    )
    _add_config_flags(command)
    command.set_defaults(run=_migrate)


def _migrate(args: argparse.Namespace) -> int:
    import asyncio

    from tx_async.private import private_umask

    with private_umask():
        return asyncio.run(_migrate_journal(_load_config(args)))


async def _migrate_journal(settings: ServerConfig) -> int:
    from tx_async.journal.factory import open_journal

    journal = open_journal(settings)
    records = await journal.open()
    await journal.close()
    print(f"The journal has the newest schema and holds {len(records)} records.")
    return 0


# ---- doctor, deploy, schemas


def _add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="look for what would keep the server from running",
        description="Checks this machine and the settings.",
    )
    command.add_argument("--device", default="", help="print the memory plan of another machine: h100 …")
    command.add_argument("--devices", type=int, default=0, help="how many of them there are")
    _add_config_flags(command)
    command.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from tx_async.doctor import run, run_plan

    config = _load_config(args)
    return run_plan(config, args.device, args.devices) if args.device else run(config)


def _add_deploy(commands: Any) -> None:
    command = commands.add_parser(
        "deploy",
        help="print files that run or watch a server elsewhere: docker, systemd, slurm, kubernetes, grafana",
        usage="tx-async deploy KIND --base-model DIR_OR_HUB_NAME [--output DIR] [settings]",
        description="Print files filled in with the given settings, or write them to a folder.",
    )
    command.add_argument(
        "kind", metavar="KIND", choices=("docker", "systemd", "slurm", "kubernetes", "grafana"),
        help="docker: an image; systemd: a unit; slurm: a job script; kubernetes: manifests; grafana: a dashboard, and "
        "with --output alert rules and a scrape configuration for Prometheus",
    )  # fmt: skip
    command.add_argument("--output", default="", metavar="DIR", help="write the files there [print them]")
    command.add_argument("--nodes", type=int, default=0, help="hosts with workers [num_processes of backend_config]")
    command.add_argument("--gpus", type=int, default=8, help="of each host [8]")
    command.add_argument("--image", default="tx-async", help="the image that Kubernetes pulls [tx-async]")
    _add_config_flags(command)
    command.set_defaults(run=_deploy)


def _deploy(args: argparse.Namespace) -> int:
    from tx_async.deploy import render

    options = render.Options(nodes=args.nodes, gpus=args.gpus, image=args.image)
    files = render.files(args.kind, _load_config(args), options)
    if not args.output:
        print(render.in_one_stream(files), end="")
        return 0
    folder = Path(args.output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            render.write(folder / name, text)
            print(folder / name)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error}") from error
    return 0


def _add_schemas(commands: Any) -> None:
    command = commands.add_parser(
        "schemas",
        help="rewrite the generated files of a checkout",
        description="JSON Schemas, golden messages, the OpenAPI description and the tables of schemas/.",
    )
    command.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 and a list when a file is stale"
    )
    command.set_defaults(run=_schemas)


def _schemas(args: argparse.Namespace) -> int:
    from tx_async.schemas import run

    return run(check=args.check, commands=command_docs())


if __name__ == "__main__":
    sys.exit(main())
