"""What a GPU says about the plugin: stages with a time limit each, for the few minutes that one is at hand.

    python -m bonsai_ops.tools.bench.gpu_check --out FOLDER --comfyui COMFYUI [--stages env,kernels,..]
                                               [--budget SECONDS] [--device cpu]

Runs in the repository's root. FOLDER/results.json is rewritten after every stage, FOLDER/log.txt holds what was
printed; a line that begins with `> ` is a figure. A stage is a process of its own, so that what breaks one, or the
GPU's context, ends no other. --device cpu runs the same code on tiny sizes, with TRITON_INTERPRET=1 the kernels too.

    env       facts, bandwidths, what bf16, int8 and fp8 reach, microseconds of the host for each layer
    kernels   every codec, mode and dtype against float64, results poisoned before; the kernels for GeForce cards as PTX
              of sm_86, which any newer GPU runs; streams, graphs, compile, other schemes; the trial kernels
    speed     the model's layers: dense bf16, ours in every way, trial kernels, int8 and fp8 alone, gemlite
    seedling  its pictures against those of the CPU in fp32
    dynamic   the 4B model in ComfyUI: load, step, memory, LoRA, offload, eager, a8, a dense model; dynamic VRAM
    classic   the same with ComfyUI's earlier memory management
    compile   the seedling under torch.compile
    bench     --layers of the project's benchmark
    tests     the project's tests that know a device

A bare machine (a GPU, Python 3.12 or newer, torch, no network) brings its packages along in the folder `.gpu` of the
repository's root, which git ignores: site.tar.xz (what ComfyUI needs beside torch) and comfyui.tar.xz. There first

    python -m bonsai_ops.tools.bench.gpu_check.unpack

puts them into /tmp/site and /tmp/comfyui; the latter is the default of --comfyui.
"""
