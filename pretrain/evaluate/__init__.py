"""What is a checkpoint worth on held-out images? Features once, then probes that read them."""
