"""Loss, perplexity and MTP loss of a checkpoint of either format, with one block in memory at a time.

- `perplexity`: the pass
- `losses`: what it computes at the end of the model
- `teacher`: a teacher that it compares the model with
"""
