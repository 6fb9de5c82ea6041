"""What runs at a terminal, beside ComfyUI. Nothing of the plugin imports it."""
