"""Loss, perplexity and MTP loss of a checkpoint of either format, and how many drafts of its MTP block are accepted.

- `perplexity`: the pass, with one block in memory at a time
- `losses`: what it computes at the end of the model
- `acceptance`: counts over speculative decoding
- `prompts`: what that starts from
"""
