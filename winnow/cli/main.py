"""The `winnow` program: the client's commands, and those that installed extras add as entry points (`winnow.commands`).

An entry point is a function or a Typer application. It is loaded only when its command is called or listed.
"""

from copy import copy
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup, TyperOption

from winnow.cli import account, audit, datasets, importing, jobs, login, pushing
from winnow.cli.console import USAGE, AsJson, Home, Key, Url, fail, options
from winnow.version import DISTRIBUTION, client_version

_SHARED = ("home", "url", "api_key", "as_json")
_PACKAGES = ("winnow", "service", "worker")
EXTRAS = {
    "service.commands.keys": "server",
    "service.commands.operate": "server",
    "service.commands.stack": "local",
    "worker.check.command": "server",
    "worker.commands": "worker",
}
"""The extra that brings what the module of an entry point imports."""


class Program(TyperGroup):
    """Loads commands on demand, and accepts the program's options after the name of a command, too."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._extensions = {entry.name: entry for entry in entry_points(group="winnow.commands")}
        shared = [param for param in self.params if param.name in _SHARED and isinstance(param, TyperOption)]
        for command in self.commands.values():
            _share_options(command, shared)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*dict.fromkeys((*super().list_commands(ctx), *self._extensions))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands and cmd_name in self._extensions:
            self.commands[cmd_name] = self.get_extension(cmd_name)
        return super().get_command(ctx, cmd_name)

    def get_extension(self, name: str) -> Any:
        """The command of an entry point, also where the program has one of the same name."""
        return _loaded(self._extensions[name])


def _loaded(entry: EntryPoint) -> Any:
    try:
        target = entry.load()
    except ModuleNotFoundError as error:
        if entry.module not in EXTRAS or (error.name or "").partition(".")[0] in _PACKAGES:
            raise
        target = _unavailable(entry.name, EXTRAS[entry.module])
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False)
        target.command(entry.name)(function)
    command = typer.main.get_command(target)
    command.name = entry.name
    _share_options(command, [])
    return command


def _unavailable(name: str, extra: str) -> typer.Typer:
    """A command that says what to install, whatever its arguments."""
    needed = f"pip install 'winnow-select[{extra}]'"
    app = typer.Typer(add_completion=False)
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command(name, help=f"Needs: {escape(needed)}", context_settings=settings)
    def unavailable() -> None:
        fail(f"`winnow {name}` needs more than the client: {needed}", USAGE)

    return app


def _share_options(command: Any, shared: list[TyperOption]) -> None:
    """Lets a command take the shared options after its name. Those that it declares itself get the value from either place."""
    for each in getattr(command, "commands", {}).values():
        _share_options(each, shared)
    if not isinstance(command, TyperCommand):
        return
    own = {param.name for param in command.params} & set(_SHARED)
    command.params += [copy(param) for param in shared if param.name not in own]
    for param in command.params:
        if param.name in _SHARED:
            param.envvar = None  # the program has read it already, and its own option takes precedence
    run = command.callback

    def callback(**values: Any) -> Any:
        for name in _SHARED:
            if given := values.pop(name, None):
                setattr(options, name, given)
        assert run is not None
        return run(**values, **{name: getattr(options, name) for name in own})

    command.callback = callback


app = typer.Typer(cls=Program, no_args_is_help=True)
for module in (jobs, datasets, importing, pushing, audit, account, login):
    module.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"{DISTRIBUTION} {client_version()}")
        raise typer.Exit


@app.callback()
def program(
    home: Home = None,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and end")
    ] = False,
) -> None:
    """Data selection as a service for fine-tuning language models."""
    options.home, options.url, options.api_key, options.as_json = home, url, api_key, as_json


def main() -> None:
    app()
