"""`/v1/usage`: what a key has used of its quotas, counted from the tables of the domains."""
