"""A model run one block at a time, with its samples on disk or in memory: below all that measures or evaluates.

- `forward`: the pass, resumed after a kill; a subclass says what it looks at
- `block`: one transformer block with its weights
- `hidden_states`, `work_dir`: what the samples are between two blocks, and where that is kept
- `samples`: the data of calibration
- `fingerprint`: which checkpoint it was
"""
