"""The numbers of a plan that no arithmetic gives: each measured once, with where it comes from. Bytes and shares."""

from __future__ import annotations

MIB = 1 << 20

CONTEXT = 560 * MIB
"""What CUDA, cuBLAS and torch's own kernels hold on a device besides tensors; a run measures it for itself."""
WORKSPACE = 64 * MIB
"""cuBLAS's workspaces, from the caching allocator: 32 MiB on Hopper (8 MiB elsewhere) for the thread of the forward pass
and for autograd's, and as much again for the stream on which CUDA graphs are captured."""
RESERVED = 0.01
"""The allocator's reserve over what comes and goes (activations, logits)."""
RESERVED_WORK = 0.146
"""The same besides over what a block's turn or the loss makes, whose tensors differ in size from one to the next: 0.08 to
0.2 of 48 settings on an H200."""
RESERVED_FIXED = 12 * MIB
"""The allocator's reserve at least: what is left of its segments of 20 MiB."""
POOL = 1.03
POOL_WORK = 0.027
"""What CUDA graphs keep to themselves over what a row takes, and besides over what a block's turn makes."""
EAGER_WORK = 0.101
"""An uncompiled block's temporaries on a GPU that no count shows (workspaces of kernels), over what it keeps."""
KEPT_MIXED = 1.1
"""What a compiled block keeps at `mixed` besides its input, in tensors as wide as its widest: the gate's product."""
NORMS = 2.0
"""Times a block's input that a compiled block keeps besides at `keep`: what its norms give."""
WORK_WIDE = {"keep": 2.503, "mixed": 3.0, "recompute": 2.922}
WORK_INPUTS = 3.422
"""A compiled block's temporaries in its backward pass, in tensors as wide as its widest and as its input: the MLP's
products and their gradients (8B on an H200: 0.94 and 0.27 GB of a peak's 1.2 GB at 8,192 tokens)."""
UNPACKS = {"keep": 0.25, "mixed": 1.062, "recompute": 1.828}
"""Packed matrices that a compiled block makes of 4-bit ones at once at its peak, in the largest (8B NF4 on an H200)."""
HEAD_INPUTS = 1.172
"""Tensors of the size of the hidden states that are there with the loss's logits besides those that are counted."""
FUSED = 0.3
"""Bytes that compiled element-wise operations move over eager ones'."""
AGAIN_MIXED = 0.5
"""Share of its forward pass that a compiled block does again at `mixed`: all but gate and down."""
AGAIN_COMPILED = 0.75
"""The same at `recompute`, where what nothing of the backward pass reads is left out: down's product, of all four."""
KERNEL_SECONDS = 2.2e-6
"""What a kernel takes on a GPU at least, started from a CUDA graph."""
EAGER_CALLS = 4.0
"""Time to start an eager operation in a training step over that of an in-place addition alone: Python around it, and
several kernels (3.1 to 4.6 of four models on an H200's host, whose steps differ by a third from one to the next)."""
UNPACK_CALLS = 4
"""Operations that an eager linear starts to unpack its weight."""
COMPILED_CALLS = 2.0
"""The same of compiled code, over all of the eager code's operations, of which it starts half."""
PRODUCT_SHARE = 1.0
"""Rate of a layer's products over that of one large product."""
HOST_SHARES = (0.5, 0.4)
"""On a CPU, of products and of element-wise operations over large ones: fitted to the shapes tiny and small of
benchmarks/results/plan_cpu.json; on its other two shapes the error of tokens/s is then 12 %."""
MOVE_SHARE = 0.85
"""Bandwidth of element-wise operations over that of one large copy."""
ATTENTION_SHARE = 0.8
ATTENTION_BACKWARD = 2.5
"""Rate of fused attention over that of one large product; its backward pass has five products for two."""
UNPACK_SHARE = 0.6
"""Bandwidth of bitsandbytes' dequantisation over that of one large copy."""
STEP_SECONDS = 0.004
"""What a step takes on a GPU whatever it computes: Python, the optimiser's launches, waiting for the loss (a 1B model on 512
tokens in a CUDA graph: 11.5 ms, of which 6.2 are its arithmetic's)."""
COMPILE_SECONDS = 18.0
"""Seconds of the first step when blocks are compiled (17.8, 25.2 and 16.8 in benchmarks/results/gpu_train.json)."""
PINNED = 1.25
"""Host memory of offloaded tensors over their bytes: pinned allocations are rounded up to powers of two."""
GPU_CHUNK, CPU_CHUNK = 256 * MIB, 64 * MIB
"""Logits of one chunk of the loss: `kernels.cross_entropy`."""
GPU_CHUNK_ROWS = 512
"""The same in positions, at least: `kernels.cross_entropy.FEWEST_ROWS`."""
AHEAD = 2
"""Blocks whose offloaded tensors are on the device at once: `training.store.Host`."""
JOINED = 2
"""Linears of a packed group of whose x Aᵀ a compiled block keeps one tensor: `kernels.group.JOINED`."""
SMALL = MIB
"""Tensors below this many bytes are not offloaded: `training.store.SMALL`."""
LONG, CHUNK = 16384, 4096
"""Tokens of a row above which a streamed base's blocks take their MLPs in chunks, and of a chunk: `training.chunks`."""
LONG_WORK = 1.3
"""The most of such a block's turn over what it keeps without the MLP's inside, its input and output besides (8B NF4 with
32,768 to 122,880 tokens in benchmarks/results/stream_gpu.json)."""
STREAM_BUFFERS = 2
"""Blocks of a streamed base on the device at once: `base.stream.SLOTS`."""
STREAM_HEAD_CHUNK, STREAM_HEAD_ROWS = 64 * MIB, 8192
"""Bytes of a streamed head on the device at once, twice, and positions that it is applied to at once: `base.stream` and
`kernels.streamed_head`."""
STREAM_LOGITS = 64 * MIB
"""Bytes of the logits that a streamed head makes at once: `kernels.streamed_head.LOGITS`."""
OVERLAP = 0.9
"""Share of the shorter of compute and copies that is hidden behind the longer."""

HOST_BASELINE = 480 * MIB
"""Resident memory of a process that has imported torch and transformers, on a CPU; a plan made here takes its own."""
HOST_KERNELS = 45 * MIB
"""Of that, what the first step adds: pages of MKL's and oneDNN's kernels and of autograd (40 to 57 MB in a process that
trained 33 M parameters on 128 to 1,024 tokens, torch 2.13)."""
HOST_RUN = 3 * (1 << 30)
"""Host memory of a training process that uses a GPU: libraries, CUDA's own, tokenised data."""
HOST_SLACK = 0.02
"""Resident memory over live bytes on a CPU: malloc's free space and the threads' own buffers."""
MARGIN = 0.03
"""A plan fits if its prediction and this share more are within the budget."""
