"""Benchmarks: commands that print the rival beside us in the same run, losing cases too."""
