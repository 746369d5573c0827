"""The command `sweep`: numbers of steps and guidances for a run, and which of them to use."""
