"""What tests share: tiny models, servers, and worlds with a service in them."""
