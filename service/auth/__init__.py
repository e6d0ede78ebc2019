"""Who is calling and what they may do: tenants, authentication, scopes, rate limits, and the limits that quotas enforce.
Every other domain receives the principal from here."""
