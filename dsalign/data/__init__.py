"""From files to the tensors of a forward pass: rows/ reads, tokens/ tokenises, batches/ packs."""
