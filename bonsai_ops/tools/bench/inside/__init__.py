"""What runs within a ComfyUI, each a process of its own that a Session starts."""
