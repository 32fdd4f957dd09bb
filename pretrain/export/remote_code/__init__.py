"""What is written beside the weights for toolkits that do not know InternImage: files that need none of ours."""
