"""What is a pre-trained backbone worth for segmentation and detection? Heads of transformers and torchvision."""
