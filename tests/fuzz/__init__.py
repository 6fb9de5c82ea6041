"""Files as nobody should write them, thrown at every reader: python -m tests.fuzz."""
