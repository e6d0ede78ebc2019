"""HTTP conventions that all routers share: errors, pagination, ETags, compression, health, the OpenAPI document.
Nothing here knows a domain."""
