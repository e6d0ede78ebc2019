"""What an upload would become, and what a model would make of it, told without a server: `winnow check`."""
