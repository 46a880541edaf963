"""RT-DETR (arXiv:2304.08069, arXiv:2407.17140): presets, backbones, encoder, decoder, and what trains them."""
