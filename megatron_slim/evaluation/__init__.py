"""Losses of a checkpoint of either format and its distance from a teacher, with one block in memory at a time; tasks.

- `perplexity`: the pass
- `losses`: what it computes at the end of the model
- `teacher`: a teacher that it compares the model with
- `tasks`: tasks of lm-evaluation-harness, on the whole model
"""
