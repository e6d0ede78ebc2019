"""API keys as a tenant's administrator and the operator manage them: creating, listing, revoking.
Authenticating a request by its key is `service.auth`."""
