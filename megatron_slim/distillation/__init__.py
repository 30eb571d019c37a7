"""Teacher and student as one model, and what is minimised.

- `model`, `options`: the student, which carries its teacher, and what it is trained by
- `recorded`: a teacher whose hidden states were recorded
- `elastic`, `selected`: several sizes of one student, whose parameters are selections of the largest one's
- `regions`, `gathered`: parts of tensors that ranks hold, and whole tensors made of them
- `loss_options`: names and defaults of the losses (no torch)
- `terms`, `schedule`: the dictionary of the terms of the loss, and how their weights move (no torch)
- `losses`: the sum of the terms (SlimQwen eq. 12)
- `counted`: the losses of the tokens that count alone
- `fused`, `functions`, `output_layer`: output layer, losses and gradients in chunks of tokens
- `divergences`, `vocabulary`: how distributions are compared, and a rank's columns of the vocabulary
- `hidden`, `layer_pairs`: distillation of hidden states, and which layers are compared
- `offload`: a teacher's weights in host memory
"""
