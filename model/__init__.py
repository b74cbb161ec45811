"""PyTorch: modules, losses, K-means, beam search. Tensors in, tensors out: no files, no Ray, no MLflow."""
