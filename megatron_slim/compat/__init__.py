"""The compatibility layer: all that changes another library, or stands in for one that is not installed.

Importing `megatron_slim.mcore` makes the changes, before anything imports Megatron; importing this package makes none.

- `patch`, `table`: a change of Megatron as a row that says why and until when; all rows
- `install`: what is changed on this machine
- `fixes_data`, `fixes_fp32`, `fixes_resume`, `fixes_routers`: bugs of Megatron-Core, on any machine
- `hooks`: what training adds to Megatron's loop
- `saving`: how its checkpoints are written
- `chained_groups`: how several optimizers save their groups of parameters
- `libraries`: what stands in for flash-linear-attention and a fused Adam
- `adam`, `linear_attention`, `delta_rule_chunks`, `causal_convolution`: the stand-ins
- `cpu_tensors`, `cpu_device`: torch on a machine without CUDA
- `cpu_megatron`, `cpu_kernels`, `cpu_memory`: Megatron and memory there
- `runtime`: backend, dtype, and a process of Megatron's that needs no launcher
- `forked_ranks`: what ranks that tests fork share
"""
