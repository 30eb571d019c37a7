"""What a teacher ends with, recorded once: training then needs its output layer, and no teacher.

- `stored_states`: hidden states as bytes, in fp32, bf16 or block-scaled FP8
- `names`: the names of its files
- `cache`: the directory, opened and read by sample
- `recording`: that directory while it is recorded, and after a kill
- `guessing`: whether a teacher knows something of the data
- `recording_pass`: the pass of one shard
- `given`: the samples that it is recorded on
- `record`: all of them
"""
