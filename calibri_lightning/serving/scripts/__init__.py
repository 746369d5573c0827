"""Servers of rewards whose models need libraries of their own; each file is run by itself, with `uv run FILE`.

Each names its libraries at its top (PEP 723), and of this package it uses `serving` alone.
"""
