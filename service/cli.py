"""`backbone-service`: the command. Each subcommand imports what it needs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import ValidationError

from service.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "backbone-service", description="Images to the features of vision backbones."
    )
    commands = parser.add_subparsers(title="commands", required=True)
    _add_serve(commands)
    _add_inspect(commands)
    return parser


# --- serve --------------------------------------------------------------------------------------


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="run the service",
        description="Run the service. Every flag is also an environment variable: --model-budget is "
        "BACKBONE_MODEL_BUDGET. Flags go before the environment.",
    )
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        text = f"{field.description} (default: {shown if shown not in ('', None) else 'none'})"
        if field.annotation is bool:
            serve.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            serve.add_argument(flag, default=None, metavar=name.upper(), help=text.replace("%", "%%"))
    serve.set_defaults(run=_serve)


def settings_from(options: argparse.Namespace) -> Settings:
    """Settings of the environment, with the flags that were given on top."""
    given = {name: value for name in Settings.model_fields if (value := getattr(options, name)) is not None}
    alias = Settings.model_fields["hub_endpoint"].validation_alias
    if "hub_endpoint" in given:
        given[str(alias)] = given.pop("hub_endpoint")
    return Settings(**given)


def _serve(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
    except ValidationError as error:
        for fault in error.errors():
            name = "_".join(str(part) for part in fault["loc"])
            print(f"backbone-service: {name + ': ' if name else ''}{fault['msg']}", file=sys.stderr)
        return 2
    from service.api.server import run_server  # the web stack is only needed here

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return run_server(settings)


# --- inspect ------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a config would build",
        description="Levels, parameters, bytes and frozen names of a backbone config, without weights, as JSON.",
    )
    inspect.add_argument(
        "backbone", help='a config as JSON ({"type":"ResNet","depth":50}) or the name of one'
    )
    inspect.add_argument("--neck", help="a neck config as JSON")
    inspect.add_argument("--input-size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="in pixels")
    inspect.add_argument("--config-dir", default=os.environ.get("BACKBONE_CONFIG_DIR", "model_configs"))
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from service.errors import ServiceError
    from service.runtime.inspect import inspect_offline

    backbone, neck = _json_or_word(options.backbone), _json_or_word(options.neck)
    size = tuple(options.input_size) if options.input_size else None
    try:
        found = inspect_offline(options.config_dir, backbone, neck, size)
    except ServiceError as error:
        print(f"backbone-service: {error.detail}", file=sys.stderr)
        return 1
    print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    return 0


def _json_or_word(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith(("{", "[", '"')):
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        sys.exit(f"backbone-service: not JSON: {error}")


if __name__ == "__main__":
    sys.exit(main())
