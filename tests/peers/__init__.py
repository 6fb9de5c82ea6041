"""Independent references for the parity tests: other projects' packers and samplers, nothing of bonsai_ops."""
