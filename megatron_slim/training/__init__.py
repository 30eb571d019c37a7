"""What we add to Megatron's training loop.

- `pretrain`: model provider, forward step and the callbacks of the loop
- `slim_arguments`, `arguments`: our flags, and Megatron's with our defaults
- `data`, `blends`: batches, and mixtures of data sets
- `checks`, `data_checks`, `loss_checks`, `fp8_checks`, `start_checks`, `missing_libraries`: before the start
- `teacher_check`, `teacher_config`: whether the teacher is the one that was recorded, and its configuration
- `resume_checks`: whether a checkpoint fits the run that resumes from it
- `carried`: a phase that begins with the optimizer of the one before
- `rates`, `progressive`, `stage_layout`: the learning rate, phases of one schedule, pipeline stages
- `teacher_ahead`, `hidden_kd`, `finite`: a teacher ahead of its student, hidden states, NaN on any rank
- `meters`, `run_figures`, `run_log`: what is measured, the figures made of it, gathering and writing them
- `run_view`, `run_plots`: a run read back, for show-run
"""
