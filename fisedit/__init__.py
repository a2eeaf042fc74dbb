"""FISEdit: sparse, cache-enabled editing of images that a diffusion U-Net generated."""
