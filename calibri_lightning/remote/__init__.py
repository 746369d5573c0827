"""The client of reward servers: what is sent (wires), how (transport), and to which of several (pool)."""
