"""A model run one block at a time, with its samples on disk or in memory: below all that measures or evaluates.

- `forward`: the pass, resumed after a kill; a subclass says what it looks at
- `block`: one transformer block with its weights
- `hidden_states`, `work_dir`: what the samples are between two blocks, and where that is kept
- `model_input`: samples, where their documents begin, and what of them counts; those of calibration
- `samples`: what is seen of them before
- `fingerprint`: which checkpoint it was
"""
