"""What training did to the weights: the analyses of arXiv 2605.11739 on checkpoints on disk.

`effopd-analyze` is the command; needs `pip install effopd-kernels[analysis]`.
"""
