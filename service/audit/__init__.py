"""The audit log: who did what, written in the transaction of the change itself.
PostgreSQL refuses to update or delete an entry."""
