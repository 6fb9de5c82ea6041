"""Independent references for the parity tests: other projects' packers and samplers, none of our mathematics."""
