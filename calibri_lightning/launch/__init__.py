"""Runs of many processes: how they meet, agree, watch over each other, stop together and start again."""
