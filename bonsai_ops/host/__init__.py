"""How packed weights live in ComfyUI: with nodes/ the only code of the plugin that imports comfy.

contract/         every name of ComfyUI that is leaned on, and why; comfyui.py: what becomes of a missing one

one layer
layout.py         a packed weight as the tensor that ComfyUI moves, counts and saves
linear.py         the layers that hold one
lora.py           what LoRAs add to a layer; patcher.py: the ModelPatcher that leaves them to it
attention.py      attention on a CPU, in parts

one model
model_class.py    ComfyUI's own classes around packed weights
tensors.py        its tensors, as they are and as they were loaded
inventory.py      what it holds and which backend multiplies it
precision.py      the dtype it computes in

files in and out
loader.py         a pack -> MODEL; text_encoder.py -> CLIP; vae.py -> VAE; pack.py: all three of a release
save.py           a MODEL -> a native file
info.py           the inventory as text and picture; sheet.py: what pictures are drawn on
folders.py        where packs lie

steps
sampling.py       through ComfyUI's sampler; schedule.py: the official sigmas
progress.py       ComfyUI's bar and Cancel button
patch/            any MODEL -> one with packed layers
"""
