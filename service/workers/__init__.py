"""The workers over HTTP: who is there, with what, and what each does. They report themselves to `service.ledger.workers`."""
