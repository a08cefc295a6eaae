"""A language model as judge, by AIR-Bench's protocol: both orders, a cache, retries, failures counted and shown."""
