"""How ranks reach each other through torch.distributed."""
