"""The evaluation servers of VOC and Cityscapes: what they take, and what they answer."""
