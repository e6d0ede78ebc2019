"""Webhooks: endpoints, deliveries and attempts, and the HTTP client that connects to public addresses only.
Deliveries are created by a database trigger in the transaction of the event."""
