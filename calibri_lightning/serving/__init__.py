"""A server of rewards and what it shares with its clients.

An island: nothing here imports more than the standard library, numpy, Pillow, pydantic and, in the server itself,
FastAPI, uvicorn and prometheus_client; of this package nothing but `errors`. It runs on Python 3.10, beside whatever
old libraries a reward model needs (`serving/scripts`).
"""
