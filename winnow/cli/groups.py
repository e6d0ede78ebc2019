"""Commands in groups: `winnow jobs ls`, `winnow jobs cancel JOB`."""

from typing import Any

import typer
from typer.core import TyperGroup


class Group(TyperGroup):
    """A group whose name alone lists, and which shows what is named in place of a command: `winnow jobs`, `winnow jobs job_...`.

    Options may come before the command's name, too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = next((word for word in args if word in self.commands), None)
        if known is not None:
            args.remove(known)
            args.insert(0, known)
        elif not any(word in ctx.help_option_names for word in args):
            is_named = len(args) > 0 and not args[0].startswith("-")
            args.insert(0, "get" if is_named and "get" in self.commands else "ls")
        return super().parse_args(ctx, args)


def add_group(app: typer.Typer, name: str, help: str, commands: dict[str, Any]) -> None:
    """Adds a group with its commands, which are functions, by their names."""
    group = typer.Typer(cls=Group, add_completion=False)
    for word, command in commands.items():
        passes_on = word in ("list", "revoke")  # the operator's own command reads their options
        settings = {"allow_extra_args": True, "ignore_unknown_options": True} if passes_on else {}
        group.command(word, context_settings=settings)(command)
    app.add_typer(group, name=name, help=help)
