"""What a model is: sizes, families, and the table of its parameters, from which nearly everything follows.

- `axes`, `weight`, `rows`, `family`: named axes, a row of the table, rows that families share, what sets a family
  apart
- `prunable`: what a size that pruning may make smaller declares of itself
- `sublayer_kind`, `full_attention`, `delta_net`, `feed_forward`, `kinds`: what a kind of sublayer declares of itself,
  those of attention and of feed-forward networks, and all of both by name
- `wrapper`: larger models that hold a language model
- `qwen3_next`, `qwen3_5_moe`, `qwen3_moe`, `glm4_moe`: the families
- `shape`, `shape_checks`: sizes, and which of them cannot be built
- `hf_config`, `mtp_keys`, `published`: config.json, what it states of MTP, published models
- `table`, `matrices`, `parts`: all parameters of a model, and how many there are; the matrices in each; which part of
  a model each is in
- `rope`, `frequencies`, `rotary`: rotary embeddings as config.json asks for them, their frequencies, and in Megatron's
  modules
- `flops`, `backward`, `gpus`: FLOPs of a token by layer, those of a step that trains some parts, peak rates of GPUs
- `parallelism`, `fp8_sizes`, `pipeline_layout`: layouts and FP8 recipes that a shape allows, balanced pipeline stages
- `layer_specs`: Megatron's modules, with Transformer Engine and without
- `local_modules`, `local_attention`, `local_experts`: those without it
- `hidden_states`, `context_parallel`, `packing`, `mtp_masks`: a GPTModel that ends with hidden states, a rank's part of
  a sequence, documents in one sequence, which predictions of MTP heads count

All but frequencies, rotary and the last four lines imports no torch.
"""
