"""Losses of a checkpoint of either format, its distance from a teacher, accepted drafts of its MTP block; tasks.

- `perplexity`: the pass, with one block in memory at a time
- `samples`: what it reads and predicts
- `losses`: what it computes at the end of the model
- `means`: means of samples that stream by, with standard errors
- `acceptance`: counts over speculative decoding
- `prompts`: what that starts from
- `teacher`: a teacher that it compares the model with
- `tasks`: tasks of lm-evaluation-harness, on the whole model
"""
