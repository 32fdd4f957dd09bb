"""M3I pre-training: recipes name objectives, views become tokens, predictions are scored in nats."""
