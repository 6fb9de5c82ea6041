"""What works on which ComfyUI: `python -m tests.hosts` makes the table of docs/hosts.md."""
