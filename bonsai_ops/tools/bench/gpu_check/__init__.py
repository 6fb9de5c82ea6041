"""What a GPU says about the plugin, for the few minutes that one is at hand: `python -m bonsai_ops.bench --gpu-check`.

    python -m bonsai_ops.bench --gpu-check --out FOLDER [--stages env,kernels,..] [--budget SECONDS] [--again]
                               [--comfyui COMFYUI] [--device cpu]

Run it in the plugin's folder with the Python that runs ComfyUI, or with any Python: one without torch looks for
ComfyUI's own. Nothing is installed and nothing is fetched. ComfyUI is the one that the plugin lies in, unless --comfyui
or BONSAI_COMFYUI names another. The Python of the Windows portable build finds modules of its own folder only:

  ..\\..\\..\\python_embeded\\python.exe -c "import sys; sys.path[:0] = '.'; from bonsai_ops import bench; bench.main()"
        --gpu-check --out FOLDER

FOLDER gets results.json after every stage (all figures), summary.md (one page, to be posted) and log.txt. A second run
with the same folder goes on: stages that came to their end are left out unless --again. A stage is made of processes,
so that what breaks one, or the GPU's context, ends no other. --budget 330 is enough for an H100; more gives every stage
more time, which slower GPUs need. --device cpu runs the same code on tiny sizes, with TRITON_INTERPRET=1 the kernels
too.

    env       facts, bandwidths, what bf16, int8 and fp8 reach, microseconds of the host for each layer
    kernels   every codec, mode and dtype against float64, results poisoned before; the kernels for GeForce cards as PTX
              of sm_86, which any newer GPU runs; streams, graphs, compile, other schemes; the trial kernels
    speed     the model's layers: dense bf16, ours in every way, trial kernels, int8 and fp8 alone, gemlite
    seedling  its pictures against those of the CPU in fp32
    dynamic   the 4B model in ComfyUI: load, step, memory, LoRA, offload, eager, int8, a dense model; dynamic VRAM, and
              Triton's cache empty, so that the first step counts compilation
    classic   the same with ComfyUI's earlier memory management
    compile   the seedling under torch.compile
    bench     --layers of the project's benchmark
    tests     the project's tests that know a device, classic and with dynamic VRAM; needs a clone and pytest

A bare machine (a GPU, Python 3.12 or newer, torch, no network) brings its packages along in the folder `.gpu` of the
repository's root, which git ignores: site.tar.xz (what ComfyUI needs beside torch) and comfyui.tar.xz, which
`python -m tests.pack_for_gpu` makes. There first

    python -m bonsai_ops.tools.bench.gpu_check.unpack

puts them into /tmp/site and /tmp/comfyui; the latter is where a ComfyUI is looked for last.
"""
