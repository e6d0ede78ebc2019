"""The commands for what belongs to a tenant besides datasets and jobs: models, keys, webhooks and limits."""

from itertools import islice
from typing import Annotated

import typer

from winnow import render
from winnow.answers import Used
from winnow.cli.console import connected, fail, options, print_json, show
from winnow.cli.groups import add_group
from winnow.cli.records import TableColumns, print_record, print_records

Limit = Annotated[int, typer.Option(min=1, help="How many, at most")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    add_group(app, "models", "Registered models.", {"ls": list_models, "get": get_model})
    keys = {"ls": list_keys, "get": get_key, "create": create_key, "rm": revoke_key}
    add_group(app, "keys", "API keys of your tenant (needs a key with the scope admin).", keys | _OPERATORS)
    webhooks = {
        "ls": list_webhooks,
        "get": get_webhook,
        "create": create_webhook,
        "rm": delete_webhook,
        "test": send_test,
        "deliveries": list_deliveries,
        "replay": replay,
    }
    add_group(app, "webhooks", "Webhooks, and what was delivered to them.", webhooks)
    app.command()(usage)
    app.command("workers")(list_workers)


_MODEL: TableColumns = {
    "name": lambda m: m.name,
    "type": lambda m: m.model_type,
    "blocks": lambda m: m.blocks,
    "base": lambda m: m.base,
    "problem": lambda m: m.problem,
}


_WORKER: TableColumns = {
    "id": lambda w: w.id,
    "state": lambda w: w.state,
    "device": lambda w: w.device,
    "does": lambda w: render.work_of(w),
    "seen": lambda w: w.seen_at,
    "problems": lambda w: " ".join(w.problems),
}


def list_workers() -> None:
    """List the workers: what each has and does (needs a key with the scope admin)."""
    with connected() as client:
        print_records(client.workers(), _WORKER)


def list_models() -> None:
    """List the models that are registered; a job may also use one from the hub."""
    with connected() as client:
        print_records(client.models(), _MODEL)


def get_model(name: str) -> None:
    """Show a registered model."""
    with connected() as client:
        found = client.models()
    chosen = next((model for model in found if model.name == name), None)
    if chosen is None:
        fail(f"{name!r} is not registered; there are {', '.join(model.name for model in found) or 'none'}")
    print_record(chosen)


def list_keys(limit: Limit = 50) -> None:
    """List your tenant's keys, newest first, revoked ones too."""
    with connected() as client:
        columns: TableColumns = {
            "id": lambda k: k.id,
            "name": lambda k: k.name,
            "scopes": lambda k: ",".join(k.scopes),
            "expires": lambda k: k.expires_at and f"{k.expires_at:%Y-%m-%d}",
            "revoked": lambda k: k.revoked_at is not None,
        }
        print_records(islice(client.keys(), limit), columns)


def get_key(key_id: str) -> None:
    """Show one of your tenant's keys."""
    with connected() as client:
        print_record(client.key(key_id))


def create_key(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="What the key is for")] = "default",
    scope: Annotated[list[str] | None, typer.Option(help="read, submit or admin; may be repeated")] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, max=3650, help="Default: never")] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="For operators: make it in the database, for this tenant, which is created if need be"),
    ] = None,
) -> None:
    """Create a key; it is printed only this once."""
    if tenant is not None:
        words = [
            "create",
            "--tenant",
            tenant,
            "--name",
            name,
            *(word for each in scope or () for word in ("--scope", each)),
        ]
        _as_operator(ctx, words + ([] if expires_in_days is None else ["--expires-in-days", str(expires_in_days)]))
        return
    given = {"scopes": scope, "expires_in_days": expires_in_days}
    with connected() as client:
        made = client.create_key(name, **{field: value for field, value in given.items() if value is not None})
    print_json(made) if options.as_json else print(made.key)


def revoke_key(key_id: Annotated[str, typer.Argument(help="key_...")]) -> None:
    """Revoke a key; safe to repeat."""
    with connected() as client:
        client.revoke_key(key_id)
    show({"id": key_id, "revoked": True}, f"{key_id}: revoked")


def list_of_all_tenants(ctx: typer.Context) -> None:
    """For operators: list the keys of all tenants, from the database; --tenant NAME only one's."""
    _as_operator(ctx, ["list", *ctx.args])


def revoke_of_any_tenant(ctx: typer.Context) -> None:
    """For operators: revoke a key by its prefix or id, in the database."""
    _as_operator(ctx, ["revoke", *ctx.args])


_OPERATORS = {"list": list_of_all_tenants, "revoke": revoke_of_any_tenant}


def _as_operator(ctx: typer.Context, words: list[str]) -> None:
    """Runs a command that knows the database: of the extra `server`."""
    command = ctx.find_root().command.get_extension("keys")  # type: ignore[attr-defined]  # of `Program`
    with command.make_context(
        "winnow keys", [*words, *["--json"] * (options.as_json and words[0] == "list")]
    ) as context:
        command.invoke(context)


def list_webhooks(limit: Limit = 50) -> None:
    """List your webhooks, newest first."""
    with connected() as client:
        columns: TableColumns = {"id": lambda w: w.id, "url": lambda w: w.url, "enabled": lambda w: w.enabled}
        print_records(islice(client.webhooks(), limit), columns)


def get_webhook(webhook_id: str) -> None:
    """Show a webhook."""
    with connected() as client:
        print_record(client.webhook(webhook_id))


def create_webhook(
    url: str,
    event: Annotated[
        list[str] | None, typer.Option(help="Only these; may be repeated: selection_job.succeeded")
    ] = None,
    description: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Register a URL to be notified of your jobs; its secret is printed only this once."""
    given = {"events": event, "description": description}
    with connected() as client:
        made = client.create_webhook(url, **{name: value for name, value in given.items() if value is not None})
    show(made, f"{made.id}", f"secret: {made.secret}")


def delete_webhook(webhook_id: str) -> None:
    """Delete a webhook with its deliveries."""
    with connected() as client:
        client.delete_webhook(webhook_id)
    show({"id": webhook_id, "deleted": True}, f"{webhook_id}: deleted")


def send_test(webhook_id: str) -> None:
    """Send a message of the type `webhook.test`."""
    with connected() as client:
        delivery = client.test_webhook(webhook_id)
    show(delivery, f"{delivery.id}: {delivery.state}")


def list_deliveries(
    webhook_id: str,
    state: Annotated[str | None, typer.Option(help="Only those in this state")] = None,
    limit: Limit = 20,
) -> None:
    """List the messages of a webhook, newest first."""
    with connected() as client:
        columns: TableColumns = {
            "id": lambda d: d.id,
            "type": lambda d: d.type,
            "state": lambda d: d.state,
            "attempts": lambda d: d.attempts,
            "created": lambda d: d.created_at,
        }
        print_records(islice(client.deliveries(webhook_id, state), limit), columns)


def replay(webhook_id: str, delivery_id: str) -> None:
    """Send a message again, under the same id."""
    with connected() as client:
        delivery = client.replay(webhook_id, delivery_id)
    show(delivery, f"{delivery.id}: {delivery.state}")


def usage() -> None:
    """Show what your key has used of its limits."""
    with connected() as client:
        found = client.usage()
    limits = ((name, getattr(found, name)) for name in type(found).model_fields)
    show(found, *(_used(name, used) for name, used in limits if isinstance(used, Used)))


def _used(name: str, used: Used) -> str:
    return f"{name}: {used.used:,} of {'any number' if used.limit is None else f'{used.limit:,}'}"
