"""Greedy decoding with caches, plain and speculative, of a checkpoint of either format, in memory as a whole.

- `weights`: a checkpoint's tensors as decoding reads them
- `cache`: keys and values, and the states of Gated DeltaNet
- `sublayers`, `experts`: attention and Gated DeltaNet, and experts, as functions of both
- `decoder`: a model that reads tokens a few at a time
- `greedy`: texts, one token after the other
- `speculative`: the same texts, from what the MTP block drafts and the trunk verifies
"""
