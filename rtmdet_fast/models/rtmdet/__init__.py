"""RTMDet (arXiv:2212.07784): backbone, neck and three heads."""
