"""Reading and writing weights: two formats, one interface, one loop.

- `huggingface`, `huggingface_files`, `safetensors_reader`: the strict reader of Hugging Face directories
- `described`: sizes and config of the model that a directory describes, in FP8 or not
- `huggingface_writer`, `safetensors_writer`: their writer
- `distributed`, `iterations`, `torch_dist_files`, `torch_dist_reader`, `metadata_pickle`, `archives`: torch_dist, read
  through restricted unpicklers
- `distributed_writer`: its writer
- `raw_files`: bytes by position, with many files open
- `torch_dist_names`, `dtype_names`, `tracker`: names of files and number types, and which checkpoint a run resumes
  from
- `layout`: rows of the table as permutations, both ways
- `units`, `transfer`, `convert`: what is streamed, the loop that reads, writes and reads back, and the whole
- `fp8_writer`, `quantization_report`: block-scaled FP8 as it is written, and what that changed
- `expert_storage`, `fp8`, `mtp`, `foreign`, `finite`: fused experts, FP8, MTP blocks, layouts of other programs, NaN
- `loading`, `precision`: a built model's own shard from either format, and what stays in fp32
- `carried`, `copies`: tensors of a larger model that travel with its language model, and those that a file has twice
- `side_files`, `records`, `provenance`, `reference`, `elastic_record`: files next to the weights
- `optimizer_state`, `optimizer_writer`, `common_state`, `plain_state`: what a run has saved in addition to weights
- `integrity`, `remarks`: SHA-256 of files, and what is not taken as it is

A source is anything that gives Hugging Face tensors by name: a directory of either format, or a pruned model.
"""
