"""What we add to Megatron's training loop.

- `pretrain`: a run from its command line to its end: resolve, check, train
- `spec`: the description of a run, from a recipe, flags and checkpoints
- `build`, `steps`: the models of a pipeline stage, and what Megatron's loop calls in a step
- `elastic`, `turns`: which budgets of an elastic student a step trains, and what is done around it
- `variables`, `slim_arguments`, `arguments`: what `megatron-slim distill` takes, our flags, and Megatron's
- `data`, `packed_data`, `cached_data`, `chat_data`, `batches`, `blends`: data sets, packed samples, those with states
  of a recorded teacher, conversations, batches, and mixtures of data sets
- `checks`, `data_checks`, `cache_checks`, `document_checks`, `loss_checks`, `fp8_checks`, `start_checks`,
  `missing_libraries`: before the start
- `teacher_check`, `teacher_config`: whether the teacher is the one that was recorded, and its configuration
- `resume_checks`: whether a checkpoint fits the run that resumes from it
- `carried`, `kept_files`: the optimizer of the phase before; what an export of a run's checkpoints needs
- `rates`, `progressive`, `stage_layout`: the learning rate, phases of one schedule, pipeline stages
- `aurora`, `polar`: a step of Aurora on one matrix, and polar factors
- `matrix_optimizer`, `matrix_stacks`, `matrix_entry`: Muon and Aurora for Megatron, under every layout
- `optimizer_flags`, `optimizer_table`: their arguments, and which weights they update
- `train_only`, `frozen`: which parts of a student are trained, and how the rest is frozen
- `teacher_ahead`, `hidden_kd`, `finite`: a teacher ahead of its student, hidden states, NaN on any rank
- `meters`, `run_figures`, `run_log`: what is measured, the figures made of it, gathering and writing them
- `run_view`, `run_plots`: a run read back, for show-run
"""
