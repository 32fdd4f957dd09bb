"""What turns any image collection into checked shards? This package; training imports only its schema."""
