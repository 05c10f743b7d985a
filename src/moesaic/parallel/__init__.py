"""One model over many processes, on ``torch.distributed``: what is trained never depends on how many there are."""
