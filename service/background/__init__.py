"""What runs beside the API's requests: the dispatcher, the sweeper of retention and the sender of webhooks.
Each is a `BackgroundLoop`, which connects, listens, leads and retries."""
