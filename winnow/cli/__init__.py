"""The `winnow` command. Commands that need the service's or the worker's dependencies are entry points (`winnow.commands`)."""
