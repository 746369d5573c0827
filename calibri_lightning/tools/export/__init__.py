"""The command `export`: turns a run into files that others can use."""
